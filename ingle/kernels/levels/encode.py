"""Encoders of 16-level formats, int8 and ternary on the CPU, in numba.

:mod:`ingle.kernels.levels.dispatch` describes results and arguments. ``weights`` are the bits of float32 (uint32) or
bfloat16 (uint16) ``[O, I]``; ``codes`` and everything after them is written, float32 as bits (uint32); threads work on
``num_chunks`` parts. The last block or group of a row may be short. NaN or infinity gives a scale that is not finite.

Legend: O = rows, I = columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.scalars import chunk_bounds, from_bits, inlined

#: Lower bound on an absmax when scaling, as in bitsandbytes: the codes of a zero block are zeros.
TINIEST = np.float32(1e-38)

#: The smallest power of two ``x`` with finite ``127 / x``. Otherwise zero times infinity would be NaN, and the result
#: of casting NaN depends on the processor.
SMALLEST = np.float32(2.0**-121)


@compile_kernel
def encode_levels(
    weights: Any, midpoints: Any, order: Any, block_size: int, codes: Any, scales: Any, num_chunks: int
) -> None:
    """Encodes 16-level codes, ``order[number of midpoints strictly below weight / absmax]``, and absmax."""
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    in_order = True
    for k in range(16):
        in_order &= order[k] == k
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, num_rows, num_chunks)
        values, counts = np.empty(block_size, np.uint32), np.empty(block_size, np.uint8)
        for row in range(first, stop):
            for block in range(scales.shape[1]):
                start = block * block_size
                length = min(block_size, num_columns - start)
                # As bits, absolute floats are ordered like integers, with infinity and then NaN at the top.
                largest = np.uint32(0)
                for k in range(length):
                    values[k] = np.uint32(weights[row, start + k]) << shift
                    largest = max(largest, values[k] & np.uint32(0x7FFFFFFF))
                scales[row, block] = largest
                count_midpoints(values, midpoints, np.float32(1) / max(from_bits(largest), TINIEST), counts, length)
                for k in range(length // 2):
                    codes[row, start // 2 + k] = counts[2 * k] << 4 | counts[2 * k + 1]
                if length % 2:  # the end of a row of odd length: the missing weight is zero
                    codes[row, (start + length) // 2] = counts[length - 1] << 4 | count_zero(midpoints)
            if not in_order:
                for k in range(codes.shape[1]):
                    codes[row, k] = order[codes[row, k] >> 4] << 4 | order[codes[row, k] & 15]


@compile_kernel
def search_bounds(values: Any, bounds: Any, codes: Any, num_chunks: int) -> None:
    """Counts, for each float32 value, how many of 255 bounds are strictly below it."""
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, values.size, num_chunks)
        for k in range(first, stop):
            below = 0
            step = 128
            while step > 0:
                below += step * (bounds[below + step - 1] < values[k])
                step //= 2
            codes[k] = below


@compile_kernel
def encode_int8(weights: Any, codes: Any, scales: Any, num_chunks: int) -> None:
    """Encodes signed bytes, ``weight * (1 / absmax * 127)`` rounded to nearest, ties to even, and absmax."""
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            from_row, to_row = weights[row], codes[row]
            largest = np.uint32(0)
            for k in range(num_columns):
                largest = max(largest, (np.uint32(from_row[k]) << shift) & np.uint32(0x7FFFFFFF))
            scales[row] = largest
            # The inverse of zero, or of a tiny absmax, would be infinite.
            factor = np.float32(127) * (np.float32(1) / max(from_bits(largest), SMALLEST))
            for k in range(num_columns):
                scaled = np.rint(from_bits(np.uint32(from_row[k]) << shift) * factor)
                to_row[k] = np.int8(min(max(scaled, np.float32(-127)), np.float32(127)))


@compile_kernel
def measure_groups(weights: Any, size: int, totals: Any, least: Any, most: Any, num_chunks: int) -> None:
    """Finds the sum, the smallest nonzero value and the maximum of the magnitudes in each group of a row."""
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            for group in range(totals.shape[1]):
                start = group * size
                end = min(start + size, num_columns)
                sum_0, sum_1, sum_2, sum_3 = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
                low, high = np.uint32(0x7F800000), np.uint32(0)
                for k in range(start, end):
                    bits = (np.uint32(weights[row, k]) << shift) & np.uint32(0x7FFFFFFF)
                    high = max(high, bits)
                    low = min(low, bits if bits != 0 else np.uint32(0x7F800000))
                for k in range(start, end - 3, 4):  # four sums, because each addition would wait for the previous one
                    sum_0 += abs(from_bits(np.uint32(weights[row, k]) << shift))
                    sum_1 += abs(from_bits(np.uint32(weights[row, k + 1]) << shift))
                    sum_2 += abs(from_bits(np.uint32(weights[row, k + 2]) << shift))
                    sum_3 += abs(from_bits(np.uint32(weights[row, k + 3]) << shift))
                for k in range(start + (end - start) // 4 * 4, end):
                    sum_0 += abs(from_bits(np.uint32(weights[row, k]) << shift))
                totals[row, group] = (sum_0 + sum_1) + (sum_2 + sum_3)
                least[row, group] = low
                most[row, group] = high


@compile_kernel
def encode_ternary(weights: Any, limits: Any, size: int, codes: Any, num_chunks: int) -> None:
    """Encodes two-bit codes: 2 above a limit, 0 below minus the limit, else 1; the first weight in the lowest bits."""
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, num_rows, num_chunks)
        counts = np.empty(codes.shape[1] * 4, np.uint8)
        counts[num_columns:] = 0
        for row in range(first, stop):
            for group in range(limits.shape[1]):
                limit = limits[row, group]
                for k in range(group * size, min((group + 1) * size, num_columns)):
                    value = from_bits(np.uint32(weights[row, k]) << shift)
                    counts[k] = np.uint8(1) + np.uint8(value > limit) - np.uint8(value < -limit)
            for k in range(codes.shape[1]):
                low, high = counts[4 * k] | counts[4 * k + 1] << 2, counts[4 * k + 2] | counts[4 * k + 3] << 2
                codes[row, k] = low | high << 4


@inlined
def count_midpoints(values: Any, midpoints: Any, inverse: Any, counts: Any, length: int) -> None:
    """Counts, for each value times ``inverse``, the midpoints strictly below it."""
    for k in range(length):
        scaled = from_bits(values[k]) * inverse
        count = np.uint8(0)
        for j in range(15):
            count += np.uint8(scaled > midpoints[j])
        counts[k] = count


@inlined
def count_zero(midpoints: Any) -> int:
    """Returns the code of zero."""
    count = 0
    for j in range(15):
        count += midpoints[j] < 0
    return count
