"""What happens to a tile of scores between the products: mask, scale, cap and softmax in place, and their gradient.

Every score comes in two parts, ``weights + rest``: the product as its dtype holds it, and what rounding took from it.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import FAST, exp, largest, load, store


@compile_float_kernel
def exponentiate(weights, rest, first, last, scale, softcap, lse):  # type: ignore[no-untyped-def]
    """Raw scores (``weights + rest``) -> softmax in ``weights``; zero where a row does not see a key."""
    num_heads, num_rows, num_keys = weights.shape
    group = num_rows // first.shape[0]
    for index in prange(num_heads * first.shape[0]):
        head, token = index // first.shape[0], index % first.shape[0]
        buffer = np.empty(num_keys, np.float32)
        for r in range(token * group, (token + 1) * group):
            more = rest[head, r] if rest.shape[0] > 0 else weights[head, r, :0]
            lse[head, r] = _softmax(weights[head, r], more, first[token], last[token], scale, softcap, buffer)


@compile_float_kernel
def differentiate(weights, rest, slopes, first, last, scale, softcap, lse, delta):  # type: ignore[no-untyped-def]
    """Raw scores (``weights + rest``) -> softmax, gradients of the softmax -> gradients of the raw scores."""
    num_heads, num_rows, num_keys = weights.shape
    group = num_rows // first.shape[0]
    for index in prange(num_heads * first.shape[0]):
        head, token = index // first.shape[0], index % first.shape[0]
        buffer = np.empty(num_keys, np.float32)
        for r in range(token * group, (token + 1) * group):
            more = rest[head, r] if rest.shape[0] > 0 else weights[head, r, :0]
            row, slope = weights[head, r], slopes[head, r]
            begin, end = first[token], last[token]
            _softmax_backward(row, more, slope, begin, end, scale, softcap, lse[head, r], delta[head, r], buffer)


# One row each, as functions of their own: inside a parallel function the compiler rewrites these loops. They run over
# slices from 0, as only such loops become vector code.


@njit(fastmath=FAST, error_model="numpy")
def _softmax(row, rest, begin, end, scale, softcap, buffer):  # type: ignore[no-untyped-def]
    seen, values = row[begin:end], buffer[: end - begin]
    if begin >= end:
        row[:] = 0
        return np.float32(-np.inf)
    _bend_all(seen, rest, begin, end, scale, softcap, values)
    top = largest(values)
    total = np.float32(0.0)
    for j in range(len(values)):
        weight = exp(values[j] - top)
        values[j] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for j in range(len(values)):
        store(seen, j, values[j] * inverse)
    row[:begin] = 0
    row[end:] = 0
    return top + np.log(total)


@njit(fastmath=FAST, error_model="numpy")
def _softmax_backward(row, rest, slope, begin, end, scale, softcap, lse, delta, buffer):  # type: ignore[no-untyped-def]
    seen, steep, values = row[begin:end], slope[begin:end], buffer[: end - begin]
    _bend_all(seen, rest, begin, end, scale, softcap, values)
    for j in range(len(values)):
        weight = exp(values[j] - lse)
        store(seen, j, weight)
        bent = values[j] / softcap if softcap > np.float32(0.0) else np.float32(0.0)
        store(steep, j, weight * (load(steep, j) - delta) * scale * (np.float32(1.0) - bent * bent))
    row[:begin] = 0
    row[end:] = 0
    slope[:begin] = 0
    slope[end:] = 0


@njit(fastmath=FAST, error_model="numpy")
def _bend_all(seen, rest, begin, end, scale, softcap, values):  # type: ignore[no-untyped-def]
    """Raw scores -> scaled and capped ones in float32."""
    if len(rest) > 0:
        more = rest[begin:end]
        for j in range(len(values)):
            values[j] = (load(seen, j) + load(more, j)) * scale
    else:
        for j in range(len(values)):
            values[j] = load(seen, j) * scale
    if softcap > np.float32(0.0):
        for j in range(len(values)):
            tanh = np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * values[j] / softcap) + np.float32(1.0))
            values[j] = softcap * tanh


@compile_float_kernel
def merge(total, total_lse, out, lse):  # type: ignore[no-untyped-def]
    """Adds a block's outputs to those of the blocks before, each in proportion to its sum of exponentials."""
    for r in prange(len(lse)):
        before, more = total_lse[r], lse[r]
        if more != np.float32(-np.inf):
            top = max(before, more)
            both = top + np.log(exp(before - top) + exp(more - top))
            _mix(total[r], exp(before - both), out[r], exp(more - both))
            total_lse[r] = both


@njit(fastmath=FAST)
def _mix(total, keep, out, share):  # type: ignore[no-untyped-def]
    for j in range(len(total)):
        total[j] = total[j] * keep + load(out, j) * share
