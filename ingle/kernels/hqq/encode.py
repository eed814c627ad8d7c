"""Numba kernel that encodes groups of weights as codes of few bits, with a float16 scale and zero per group.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = groups in a row.

A group never crosses a row; the last of a row may be short. Sixteen consecutive groups are searched side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from ingle.kernels.ggml.sub_blocks import LANES
from ingle.kernels.hqq.search import assign, fit, measure
from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.scalars import chunk_bounds, from_half, inlined, to_half

#: A scale is at least this share of the largest weight, so that the zero fits in float16.
FLOOR = np.float32(2.0**-14)
#: Trials for the scale of a constant group, one for each mantissa of a float16.
FRACTIONS = 1024
#: Constants below this are stored as 1024 times their value times 1/1024, because small float16 numbers lose digits.
SMALL = np.float32(2.0**-4)
#: The bits of float16's largest finite number.
LARGEST = 0x7BFF


@inlined
def lay_out(
    values: Any, importance: Any, num_columns: int, size: int, first: int, num_lanes: int, x: Any, w: Any
) -> None:
    """Lays 16 groups from number ``first`` on side by side; the missing part of a short one has weight zero.

    If the importance of a full group is zero, all its weights count equally.
    """
    per_row = -(-num_columns // size)
    for lane in range(LANES):
        group = first + min(lane, num_lanes - 1)
        column = group % per_row * size
        at, length = group // per_row * num_columns + column, min(size, num_columns - column)
        for k in range(size):
            x[k * LANES + lane] = values[at + k] if k < length else np.float32(0)
            w[k * LANES + lane] = np.float32(k < length)
        if importance.size:
            total = np.float32(0)
            for k in range(length):
                total += importance[column + k]
            if total > 0:
                for k in range(length):
                    w[k * LANES + lane] = importance[column + k] / total


@inlined
def encode_constant(value: Any) -> tuple[Any, Any]:
    """Returns the bits of a scale and a zero for which ``(0 - zero) * scale`` is the value, as far as float16 allows.

    Zero gets the scale 1, so that an offset can be added later.
    """
    small = abs(value) < SMALL
    size = abs(value) * np.float32(1024) if small else abs(value)
    scale, zero, best = to_half(np.float32(1)), to_half(np.float32(0)), size
    for fraction in range(FRACTIONS):
        factor = np.float32(1) + np.float32(fraction) / np.float32(FRACTIONS)
        bits = to_half(size / factor)
        error = abs(from_half(bits) * factor - size)
        if error < best:
            best, scale = error, bits
            zero = to_half(factor / np.float32(1024) if small else factor)
        if best == 0:
            break
    return scale, zero ^ np.uint16(0x8000) if value > 0 else zero


@inlined
def round_grids(x: Any, w: Any, fields: Any, size: int, top: Any, trial: Any, scales: Any, zeros: Any) -> None:
    """Rounds 16 grids to float16: takes the best of three neighboring scales, each with its best zero.

    Args:
        x: The weights, centered.
        w: Their weights.
        fields: The results of ``fit``.
        size: Elements of a group.
        top: The highest code.
        trial: 3 x 16 float32; rows 0 and 1 end as scale and zero of the grid for the centered weights.
        scales: 16 uint16, written: bits of float16.
        zeros: 16 uint16, written.
    """
    best = np.full(LANES, np.inf, np.float32)
    kept = np.ones((2, LANES), np.float32)
    bits = np.empty((2, LANES), np.uint16)
    for shift in range(-1, 2):
        for lane in range(LANES):
            scale, center, mean = fields[lane], fields[LANES + lane], fields[2 * LANES + lane]
            floor = FLOOR * max(abs(fields[3 * LANES + lane]), abs(fields[4 * LANES + lane]))
            if not scale > floor:
                scale, center = floor, top / np.float32(2)
            near: Any = np.int64(to_half(scale)) + shift
            bits[0, lane] = min(max(near, 1), LARGEST)
            scale = from_half(bits[0, lane])
            bits[1, lane] = to_half(center - mean / scale)
            trial[lane] = scale
            trial[LANES + lane] = from_half(bits[1, lane]) + mean / scale
        measure(x, w, trial, size, top)
        for lane in range(LANES):
            error = trial[2 * LANES + lane]
            if error < best[lane]:
                best[lane], scales[lane], zeros[lane] = error, bits[0, lane], bits[1, lane]
                kept[0, lane], kept[1, lane] = trial[lane], trial[LANES + lane]
    for lane in range(LANES):
        trial[lane], trial[LANES + lane] = kept[0, lane], kept[1, lane]
        if fields[3 * LANES + lane] == fields[4 * LANES + lane]:
            scales[lane], zeros[lane] = encode_constant(fields[3 * LANES + lane])


@inlined
def put_codes(codes: Any, lane: int, length: int, bits: int, data: Any, at: int) -> None:
    """Stores the codes of a group, the first in the lowest bits of the first byte."""
    word, num_bits = np.uint32(0), 0
    for k in range(length):
        word |= np.uint32(codes[k * LANES + lane]) << np.uint32(num_bits)
        num_bits += bits
        while num_bits >= 8:
            data[at] = np.uint8(word & np.uint32(255))
            word >>= np.uint32(8)
            num_bits -= 8
            at += 1
    if num_bits:
        data[at] = np.uint8(word)


@compile_kernel
def encode_groups(
    values: Any, importance: Any, bits: int, size: int, first_trim: Any, step: Any, starts: int,
    codes: Any, scales: Any, zeros: Any, num_chunks: int,
) -> None:  # fmt: skip
    """Encodes weights.

    Args:
        values: float32 ``[O, I]``.
        importance: float32 ``[I]`` or empty.
        bits: Bits of a code.
        size: Weights of a group.
        first_trim: Share of the range that the first start excludes at an end; a negative share extends the range.
        step: Share that each further start excludes in addition.
        starts: Number of starts at either end.
        codes: uint8 ``[O, C]``, written.
        scales: uint16 ``[O, N]``, written: bits of float16.
        zeros: uint16 ``[O, N]``, written.
        num_chunks: Number of parts that the groups are divided into for threads.
    """
    num_columns, per_row, row_bytes = values.shape[1], scales.shape[1], codes.shape[1]
    num_groups, top = scales.size, np.float32((1 << bits) - 1)
    flat, data = values.reshape(-1), codes.reshape(-1)
    flat_scales, flat_zeros = scales.reshape(-1), zeros.reshape(-1)
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, -(-num_groups // LANES), num_chunks)
        x, w = np.empty(size * LANES, np.float32), np.empty(size * LANES, np.float32)
        found, fields = np.empty(size * LANES, np.uint8), np.empty(5 * LANES, np.float32)
        trial = np.empty(3 * LANES, np.float32)
        found_scales, found_zeros = np.zeros(LANES, np.uint16), np.zeros(LANES, np.uint16)
        for block in range(first, stop):
            number = block * LANES
            num_lanes = min(LANES, num_groups - number)
            lay_out(flat, importance, num_columns, size, number, num_lanes, x, w)
            fit(x, w, fields, size, top, first_trim, step, starts)
            round_grids(x, w, fields, size, top, trial, found_scales, found_zeros)
            assign(x, found, trial, size, top)
            for lane in range(num_lanes):
                group = number + lane
                flat_scales[group], flat_zeros[group] = found_scales[lane], found_zeros[lane]
                if fields[3 * LANES + lane] == fields[4 * LANES + lane]:
                    for k in range(size):
                        found[k * LANES + lane] = np.uint8(0)
                column = group % per_row * size
                at = group // per_row * row_bytes + column * bits // 8
                put_codes(found, lane, min(size, num_columns - column), bits, data, at)
