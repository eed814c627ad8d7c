"""The scales of GGUF's k-quants, which are packed in a few bits themselves.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ingle.kernels.ggml.block import lay_out_importance, nearest, sum_squares
from ingle.kernels.ggml.lanes import LANES, TINIEST


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_positive(values: Any, first: int, count: int, top: int, weights: Any, codes: Any) -> Any:
    """``make_qp_quants`` of ``values[first:]``, none of them negative: their codes, and the scale."""
    largest = np.float32(0)
    for k in range(count):
        largest = max(largest, values[first + k])
    if largest < np.float32(TINIEST):
        for k in range(count):
            codes[k] = 0
        return np.float32(0)
    inverse = np.float32(top) / largest
    best = np.float32(0)
    for k in range(count):
        difference = values[first + k] - np.float32(1) / inverse * np.float32(nearest(inverse * values[first + k]))
        best += weights[k] * difference * difference
    for attempt in range(-4, 5):
        if attempt == 0:
            continue
        other = (np.float32(0.1) * np.float32(attempt) + np.float32(top)) / largest
        scale = np.float32(1) / other
        error = np.float32(0)
        for k in range(count):
            difference = values[first + k] - scale * np.float32(min(top, nearest(other * values[first + k])))
            error += weights[k] * difference * difference
        if error < best:
            best = error
            inverse = other
    sum_lx, sum_l2 = np.float32(0), np.float32(0)
    for k in range(count):
        codes[k] = min(top, nearest(inverse * values[first + k]))
        level, weight = np.float32(codes[k]), weights[k]
        sum_lx += weight * values[first + k] * level
        sum_l2 += weight * level * level
    for _ in range(5):
        changed = False
        for k in range(count):
            value, level, weight = values[first + k], np.float32(codes[k]), weights[k]
            rest_lx = sum_lx - weight * value * level
            rest_l2 = sum_l2 - weight * level * level
            if rest_lx > 0 and rest_l2 > 0:
                code = min(top, nearest(value * rest_l2 / rest_lx))
                if code != codes[k]:
                    rest_lx += weight * value * np.float32(code)
                    rest_l2 += weight * np.float32(code) * np.float32(code)
                    if rest_lx * rest_lx * sum_l2 > sum_lx * sum_lx * rest_l2:
                        codes[k], sum_lx, sum_l2, changed = code, rest_lx, rest_l2, True
        if not changed:
            break
    return sum_lx / sum_l2 if sum_l2 > 0 else np.float32(0)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def weigh_by_block(
    values: Any, importance: Any, at: int, count: int, num_lanes: int, factor: Any, w: Any, fields: Any
) -> None:
    """Importance side by side, and in field 0 the mean square of the block of 256 times ``factor``."""
    lay_out_importance(importance, at, count, num_lanes, w)
    per_block = 256 // count
    for block in range(num_lanes // per_block):
        energy = np.float32(factor) * sum_squares(values, at + 256 * block, 256) / np.float32(256)
        for lane in range(per_block):
            fields[block * per_block + lane] = energy


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def find_scales_plain(fields: Any, first: int, count: int, top: int, row: int, levels: Any) -> Any:
    """Codes of scales (or minima, in another ``row``) by their largest, and what one code is worth."""
    largest = np.float32(0)
    for k in range(count):
        largest = max(largest, fields[row * LANES + first + k])
    inverse = np.float32(top) / largest if largest > 0 else np.float32(0)
    for k in range(count):
        levels[k] = min(top, nearest(inverse * fields[row * LANES + first + k]) & 255)
    return largest / np.float32(top)
