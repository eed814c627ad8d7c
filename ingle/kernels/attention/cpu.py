"""Packed attention on a CPU: oneDNN computes the matrix products, and numba everything between them.

torch's own CPU attention reaches a tenth of the rate of its matrix products. Here documents are divided into tiles,
[tokens x heads of a group] by [keys], that stay in cache. A tile takes one batched product for the scores of all
key/value heads, one pass that masks and exponentiates in place, and one product with the values.

Queries of a group read the same keys, so they are stacked as rows, and keys are never repeated.

In bfloat16, oneDNN compiles a product for each new shape, which takes longer than the product of a short document. So
tiles are padded to a few shapes. The padding is zeros that no row sees; it holds nothing of another document. Causal
tiles without a bias are not padded: their results are equal, to the bit, to those of earlier versions. Those of answers
in trees are padded, since their blocks have many shapes.

The gradients of keys and values are float32 sums over the tiles that see them, in the order of the row. They depend
neither on the number of threads nor on other documents or trees.

Legend: as in :mod:`ingle.kernels.attention.spans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.nn.functional import pad

from ingle.kernels.attention.spans import AttentionSpans, Block, Tile, padded_size
from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import FAST, as_array, bits, exp, largest, load, store
from ingle.kernels.threads import match_threads

_NO_BIAS = np.empty((1, 0), np.float32)  # one row without columns


@dataclass(frozen=True)
class Scores:
    """The operations on ``q k^T`` before the softmax.

    Attributes:
        scale: Factor on the scores.
        softcap: Bound on the scaled scores, ``softcap * tanh(score / softcap)``; 0 for none.
        bias: Added to the scores of each head by distance, float32 [Hq, 2L - 1]: column ``key - query + L - 1``. Not
            together with a softcap.
    """

    scale: float
    softcap: float = 0.0
    bias: Tensor | None = None

    def shifted_bias(self, tile: Tile, block: Block) -> tuple[Any, int]:
        """Returns the bias, and its column for the first row and key of a block; an empty array if there is none."""
        if self.bias is None:
            return _NO_BIAS, 0
        assert not tile.is_answer, "distances to the keys of a prompt differ between its answers"
        return as_array(self.bias), block.keys[0] - tile.rows[0] + self.bias.shape[1] // 2


def attend(q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, scores: Scores) -> tuple[Tensor, Tensor]:
    """Computes attention over grouped, flat tensors.

    Args:
        q: [N * Hq * Dh], grouped by tiles.
        k: [N * Hkv * Dh], grouped by segments.
        v: [N * Hkv * Dh], grouped by segments.
        spans: Keys that each token sees.
        scores: What is done with the scores.

    Returns:
        The outputs, grouped like ``q``, and the log-sum-exp of each row's scores, float32 [N * Hq] in that layout.
    """
    heads = spans.heads
    out, lse = torch.empty_like(q), torch.empty(len(q) // heads.size, dtype=torch.float32)
    scratch = torch.empty(0, dtype=q.dtype)
    for tile in spans.tiles:
        pads = _pads(q, spans, scores, tile)
        num_tokens = _size(tile.rows, pads, tile)
        results = tile.queries(out, heads), tile.numbers(lse, heads)
        queries, tile_out, tile_lse = (
            _fit(t, num_tokens * heads.group, pads) for t in (tile.queries(q, heads), *results)
        )
        merged = _Merged(tile_out, tile_lse) if len(tile.blocks) > 1 else None
        for block in tile.blocks:
            keys, values = (_fit(tile.keys(block, t, heads), _size(block.keys, pads, tile), pads) for t in (k, v))
            keys = keys.contiguous()
            scratch, (weights, rest) = _take(scratch, (heads.kv, queries.shape[1], keys.shape[1]), 2)
            rest = _multiply(queries, keys, weights, rest)
            match_threads(weights.numel())
            exponentiate(
                bits(weights),
                bits(rest),
                *tile.visible(block, spans, num_tokens),
                np.float32(scores.scale),
                np.float32(scores.softcap),
                *scores.shifted_bias(tile, block),
                tile_lse.numpy(),
            )
            torch.bmm(weights, values, out=tile_out)
            if merged is not None:
                merged.add()
        if merged is not None:
            merged.finish()
        for result, computed in zip(results, (tile_out, tile_lse), strict=True):
            _store(computed, result)
    return out, lse


class _Merged:
    """Merges the outputs over several blocks of keys, each of which has its own softmax.

    Args:
        out: [Hkv, P, Dh] of the latest block; :meth:`finish` stores the merged outputs there.
        lse: [Hkv, P], the log-sum-exp of the latest block; then that of all blocks.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self._out, self._lse = out, lse
        self._total = torch.zeros(out.shape, dtype=torch.float32)
        self._total_lse = torch.full(lse.shape, -torch.inf)

    def add(self) -> None:
        """Adds the latest block."""
        match_threads(self._out.numel())
        arrays = (self._total, self._total_lse, self._out, self._lse)
        merge(*(bits(tensor.flatten(0, 1)) for tensor in arrays))

    def finish(self) -> None:
        """Stores the outputs over all blocks and their log-sum-exp."""
        self._out.copy_(self._total)
        self._lse.copy_(self._total_lse)


def attend_backward(
    grad_out: Tensor,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    scores: Scores,
    grad_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, grouped; recomputes the softmax from its log-sum-exp.

    Args:
        grad_out: Gradient of the outputs, grouped by tiles.
        delta: Sum of gradient times output of each row, float32 [N * Hq].
        lse: The result of :func:`attend`.
        q: Queries; this and the following arguments are those of :func:`attend`.
        k: Keys.
        v: Values.
        spans: Keys that each token sees.
        scores: What is done with the scores.
        grad_bias: The gradient of ``scores.bias`` is added to it, if given.

    Source: Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), algorithm 4.
    """
    heads = spans.heads
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=torch.float32) for t in (k, v))
    scratch = torch.empty(0, dtype=q.dtype)
    for tile in spans.tiles:
        pads = _pads(q, spans, scores, tile)
        num_tokens = _size(tile.rows, pads, tile)
        queries, grads, tile_grad_q, tile_lse, tile_delta = (
            _fit(t, num_tokens * heads.group, pads)
            for t in (
                *(tile.queries(grouped, heads) for grouped in (q, grad_out, grad_q)),
                *(tile.numbers(sums, heads) for sums in (lse, delta)),
            )
        )
        total = torch.zeros(queries.shape, dtype=torch.float32) if len(tile.blocks) > 1 else None
        for block in tile.blocks:
            num_keys = block.keys[1] - block.keys[0]
            keys, values = (_fit(tile.keys(block, t, heads), _size(block.keys, pads, tile), pads) for t in (k, v))
            keys = keys.contiguous()
            scratch, (weights, slopes, rest) = _take(scratch, (heads.kv, queries.shape[1], keys.shape[1]), 3)
            torch.bmm(grads, values.transpose(1, 2), out=slopes)
            rest = _multiply(queries, keys, weights, rest)
            match_threads(weights.numel())
            differentiate(
                bits(weights),
                bits(rest),
                bits(slopes),
                *tile.visible(block, spans, num_tokens),
                np.float32(scores.scale),
                np.float32(scores.softcap),
                *scores.shifted_bias(tile, block),
                tile_lse.numpy(),
                tile_delta.numpy(),
            )
            if grad_bias is not None:
                _, shift = scores.shifted_bias(tile, block)
                add_diagonals(bits(slopes), np.float32(1 / scores.scale), heads.group, shift, as_array(grad_bias))
            tile.keys(block, grad_v, heads).add_(torch.bmm(weights.transpose(1, 2), grads)[:, :num_keys])
            tile.keys(block, grad_k, heads).add_(torch.bmm(slopes.transpose(1, 2), queries)[:, :num_keys])
            torch.bmm(slopes, keys, out=tile_grad_q)
            if total is not None:
                total += tile_grad_q
        if total is not None:
            tile_grad_q.copy_(total)
        _store(tile_grad_q, tile.queries(grad_q, heads))
    return grad_q, grad_k, grad_v


def _pads(q: Tensor, spans: AttentionSpans, scores: Scores, tile: Tile) -> bool:
    """Returns whether a tile is padded to one of a few shapes; no product is compiled in float32."""
    return q.dtype == torch.bfloat16 and (not spans.causal or scores.bias is not None or tile.is_answer)


def _size(bounds: tuple[int, int], pads: bool, tile: Tile) -> int:
    count = bounds[1] - bounds[0]
    return padded_size(count, is_answer=tile.is_answer) if pads else count


def _fit(tensor: Tensor, num_rows: int, pads: bool) -> Tensor:
    """Returns a [Hkv, P, ...] tensor with rows of zeros up to ``num_rows``, contiguous; unchanged without padding."""
    missing = num_rows - tensor.shape[1]
    if not pads or missing == 0:
        return tensor.contiguous() if pads else tensor
    return pad(tensor, (*(0, 0) * (tensor.dim() - 2), 0, missing))


def _store(computed: Tensor, result: Tensor) -> None:
    """Copies the rows of a tile to the result, unless they were computed in its memory."""
    if computed.data_ptr() != result.data_ptr():
        result.copy_(computed[:, : result.shape[1]])


def _multiply(queries: Tensor, keys: Tensor, scores: Tensor, rest: Tensor) -> Tensor:
    """Stores ``q k^T`` in ``scores`` and the error of rounding it to bfloat16 in ``rest``.

    In bfloat16, a score of 20 has an error of up to 1/16, and its softmax one of 6 %. The product is summed in float32
    before it is rounded, so a second product that starts from minus the first gives exactly the error. In float32 the
    error is negligible, and ``rest`` is empty.
    """
    torch.bmm(queries, keys.transpose(1, 2), out=scores)
    if scores.dtype == torch.float32:
        return rest[:0]
    return torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=-1, out=rest)


def _take(scratch: Tensor, shape: tuple[int, int, int], count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    size = shape[0] * shape[1] * shape[2]
    if len(scratch) < count * size:
        scratch = torch.empty(count * size, dtype=scratch.dtype)
    return scratch, tuple(scratch[i * size : (i + 1) * size].view(shape) for i in range(count))


@compile_float_kernel
def exponentiate(weights, rest, first, last, scale, softcap, bias, shift, lse):  # type: ignore[no-untyped-def]
    """Replaces raw scores in ``weights`` by their softmax; zero where a row does not see a key."""
    num_heads, num_rows, num_keys = weights.shape
    group = num_rows // first.shape[0]
    for index in prange(num_heads * first.shape[0]):
        head, token = index // first.shape[0], index % first.shape[0]
        buffer = np.empty(num_keys, np.float32)
        for r in range(token * group, (token + 1) * group):
            more = rest[head, r] if rest.shape[0] > 0 else weights[head, r, :0]
            added, at = bias[(head * group + r % group) % bias.shape[0]], shift - token
            begin, end = first[token], last[token]
            lse[head, r] = _softmax(weights[head, r], more, begin, end, scale, softcap, added, at, buffer)


@compile_float_kernel
def differentiate(weights, rest, slopes, first, last, scale, softcap, bias, shift, lse, delta):  # type: ignore[no-untyped-def]
    """Replaces raw scores by their softmax, and gradients of the softmax by gradients of the raw scores."""
    num_heads, num_rows, num_keys = weights.shape
    group = num_rows // first.shape[0]
    for index in prange(num_heads * first.shape[0]):
        head, token = index // first.shape[0], index % first.shape[0]
        buffer = np.empty(num_keys, np.float32)
        for r in range(token * group, (token + 1) * group):
            more = rest[head, r] if rest.shape[0] > 0 else weights[head, r, :0]
            row, slope = weights[head, r], slopes[head, r]
            begin, end = first[token], last[token]
            added, at = bias[(head * group + r % group) % bias.shape[0]], shift - token
            sums = lse[head, r], delta[head, r]
            _softmax_backward(row, more, slope, begin, end, scale, softcap, added, at, sums, buffer)


@compile_float_kernel
def add_diagonals(slopes, factor, group, shift, grad_bias):  # type: ignore[no-untyped-def]
    """Adds gradients of raw scores to the gradient of a bias by distance; they are zero where a row sees no key."""
    num_heads, num_rows = slopes.shape[:2]
    for index in prange(num_heads * group):
        head, member = index // group, index % group
        for token in range(num_rows // group):
            _add_row(slopes[head, token * group + member], factor, shift - token, grad_bias[index])


# These functions process one row each. They are separate because inside a parallel function the compiler would rewrite
# their loops. The loops run over slices from 0, because only such loops are vectorized.


@njit(fastmath=FAST, error_model="numpy")
def _softmax(row, rest, begin, end, scale, softcap, bias, at, buffer):  # type: ignore[no-untyped-def]
    seen, values = row[begin:end], buffer[: end - begin]
    if begin >= end:
        row[:] = 0
        return np.float32(-np.inf)
    _transform(seen, rest, begin, end, scale, softcap, bias, at, values)
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
def _softmax_backward(row, rest, slope, begin, end, scale, softcap, bias, at, sums, buffer):  # type: ignore[no-untyped-def]
    seen, steep, values = row[begin:end], slope[begin:end], buffer[: end - begin]
    lse, delta = sums
    _transform(seen, rest, begin, end, scale, softcap, bias, at, values)
    for j in range(len(values)):
        weight = exp(values[j] - lse)
        store(seen, j, weight)
        capped = values[j] / softcap if softcap > np.float32(0.0) else np.float32(0.0)
        store(steep, j, weight * (load(steep, j) - delta) * scale * (np.float32(1.0) - capped * capped))
    row[:begin] = 0
    row[end:] = 0
    slope[:begin] = 0
    slope[end:] = 0


@njit(fastmath=FAST, error_model="numpy")
def _transform(seen, rest, begin, end, scale, softcap, bias, at, values):  # type: ignore[no-untyped-def]
    """Returns scaled scores with softcap or bias, in float32."""
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
    if len(bias) > 0:
        added = bias[at + begin : at + end]
        for j in range(len(values)):
            values[j] += added[j]


@njit(fastmath=FAST)
def _add_row(slope, factor, at, grad_bias):  # type: ignore[no-untyped-def]
    begin = max(0, -at)
    end = max(begin, min(len(slope), len(grad_bias) - at))  # not below: a padded row may have no distance in the bias
    steep, total = slope[begin:end], grad_bias[at + begin : at + end]
    for j in range(len(total)):
        total[j] += load(steep, j) * factor


@compile_float_kernel
def merge(total, total_lse, out, lse):  # type: ignore[no-untyped-def]
    """Merges a block's outputs with those of earlier blocks, in proportion to their sums of exponentials."""
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
