"""Packing weights on the CPU, by numba: every load of a model passes through here.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = blocks in a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from ingle.kernels.numba.cache import compile_kernel

#: Below this an absmax is taken as this for scaling, as bitsandbytes does: the codes of a zero block are zeros.
TINIEST = np.float32(1e-38)

#: The least power of two whose 127-fold inverse is finite.  A zero times infinity would be a NaN, and what a cast makes
#: of a NaN depends on the processor.
SMALLEST = np.float32(2.0**-121)


@intrinsic  # type: ignore[untyped-decorator]
def from_bits(_: Any, bits: Any) -> tuple[Any, Any]:
    """The float32 of these uint32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@compile_kernel
def encode_levels(
    weights: Any, midpoints: Any, order: Any, block_size: int, codes: Any, scales: Any, num_chunks: int
) -> None:
    """Packs weights into 16-level codes, by the number of midpoints strictly below ``weight / absmax``.

    A NaN or infinity leaves a scale that is not finite.

    Args:
        weights: The bits of float32 (uint32) or bfloat16 (uint16) ``[O, I]``.
        midpoints: 15 float32, ascending.
        order: 16 uint8, the code for every number of midpoints.
        block_size: Weights that share a scale; the last block of a row may be short.
        codes: uint8 ``[O, C]``, written; the even weight in the high nibble.
        scales: uint32 ``[O, N]``, written: the bits of every block's float32 absmax.
        num_chunks: Parts the rows are split into.
    """
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    in_order = True
    for k in range(16):
        in_order &= order[k] == k
    for chunk in prange(num_chunks):
        signed = np.int64(chunk)  # numba counts chunks unsigned, which times a signed number is a float
        values, counts = np.empty(block_size, np.uint32), np.empty(block_size, np.uint8)
        for row in range(signed * num_rows // num_chunks, (signed + 1) * num_rows // num_chunks):
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
                if length % 2:  # the end of an odd row; the missing weight counts as zero
                    codes[row, (start + length) // 2] = counts[length - 1] << 4 | count_zero(midpoints)
            if not in_order:
                for k in range(codes.shape[1]):
                    codes[row, k] = order[codes[row, k] >> 4] << 4 | order[codes[row, k] & 15]


@compile_kernel
def search_bounds(values: Any, bounds: Any, codes: Any, num_chunks: int) -> None:
    """How many of 255 bounds lie strictly below every value.

    Args:
        values: float32, flat.
        bounds: 255 float32, ascending.
        codes: uint8, flat, written.
        num_chunks: Parts the values are split into.
    """
    for chunk in prange(num_chunks):
        signed = np.int64(chunk)
        for k in range(signed * values.size // num_chunks, (signed + 1) * values.size // num_chunks):
            below = 0
            step = 128
            while step > 0:
                below += step * (bounds[below + step - 1] < values[k])
                step //= 2
            codes[k] = below


@compile_kernel
def encode_int8(weights: Any, codes: Any, scales: Any, num_chunks: int) -> None:
    """Packs rows into signed bytes: ``weight * (1 / absmax * 127)`` as torch divides, rounded half to even.

    A NaN or infinity leaves a scale that is not finite.

    Args:
        weights: The bits of float32 (uint32) or bfloat16 (uint16) ``[O, I]``.
        codes: int8 ``[O, I]``, written.
        scales: uint32 ``[O]``, written: the bits of every row's float32 absmax.
        num_chunks: Parts the rows are split into.
    """
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    for chunk in prange(num_chunks):
        signed = np.int64(chunk)
        for row in range(signed * num_rows // num_chunks, (signed + 1) * num_rows // num_chunks):
            from_row, to_row = weights[row], codes[row]
            largest = np.uint32(0)
            for k in range(num_columns):
                largest = max(largest, (np.uint32(from_row[k]) << shift) & np.uint32(0x7FFFFFFF))
            scales[row] = largest
            # A zero row has nothing to divide by, and a tiny one would divide into infinity.
            factor = np.float32(127) * (np.float32(1) / max(from_bits(largest), SMALLEST))
            for k in range(num_columns):
                scaled = np.rint(from_bits(np.uint32(from_row[k]) << shift) * factor)
                to_row[k] = np.int8(min(max(scaled, np.float32(-127)), np.float32(127)))


@compile_kernel
def measure_groups(weights: Any, size: int, totals: Any, least: Any, most: Any, num_chunks: int) -> None:
    """Sums up sizes in groups of a row, and finds the least that is not zero and the largest.

    Args:
        weights: The bits of float32 (uint32) or bfloat16 (uint16) ``[O, I]``.
        size: Weights of a group; the last of a row may be short.
        totals: float64 ``[O, N]``, written.
        least: uint32 ``[O, N]``, written: float32 bits, infinity where all are zero.
        most: uint32 ``[O, N]``, written: float32 bits.
        num_chunks: Parts the rows are split into.
    """
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    for chunk in prange(num_chunks):
        signed = np.int64(chunk)
        for row in range(signed * num_rows // num_chunks, (signed + 1) * num_rows // num_chunks):
            for group in range(totals.shape[1]):
                start = group * size
                stop = min(start + size, num_columns)
                first, second, third, fourth = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
                low, high = np.uint32(0x7F800000), np.uint32(0)
                for k in range(start, stop):
                    bits = (np.uint32(weights[row, k]) << shift) & np.uint32(0x7FFFFFFF)
                    high = max(high, bits)
                    low = min(low, bits if bits != 0 else np.uint32(0x7F800000))
                for k in range(start, stop - 3, 4):  # four sums, because one would wait for itself at every weight
                    first += abs(from_bits(np.uint32(weights[row, k]) << shift))
                    second += abs(from_bits(np.uint32(weights[row, k + 1]) << shift))
                    third += abs(from_bits(np.uint32(weights[row, k + 2]) << shift))
                    fourth += abs(from_bits(np.uint32(weights[row, k + 3]) << shift))
                for k in range(start + (stop - start) // 4 * 4, stop):
                    first += abs(from_bits(np.uint32(weights[row, k]) << shift))
                totals[row, group] = (first + second) + (third + fourth)
                least[row, group] = low
                most[row, group] = high


@compile_kernel
def encode_ternary(weights: Any, limits: Any, size: int, codes: Any, num_chunks: int) -> None:
    """Packs weights into codes of two bits: 2 above a limit, 0 below minus the limit, else 1.

    Args:
        weights: The bits of float32 (uint32) or bfloat16 (uint16) ``[O, I]``.
        limits: float32 ``[O, N]``.
        size: Weights of a group, a multiple of four; the last of a row may be short.
        codes: uint8 ``[O, C]``, written; the first weight of a byte in its lowest bits.
        num_chunks: Parts the rows are split into.
    """
    num_rows, num_columns = weights.shape
    shift = np.uint32(0 if weights.itemsize == 4 else 16)
    for chunk in prange(num_chunks):
        signed = np.int64(chunk)
        counts = np.empty(codes.shape[1] * 4, np.uint8)
        counts[num_columns:] = 0
        for row in range(signed * num_rows // num_chunks, (signed + 1) * num_rows // num_chunks):
            for group in range(limits.shape[1]):
                limit = limits[row, group]
                for k in range(group * size, min((group + 1) * size, num_columns)):
                    value = from_bits(np.uint32(weights[row, k]) << shift)
                    counts[k] = np.uint8(1) + np.uint8(value > limit) - np.uint8(value < -limit)
            for k in range(codes.shape[1]):
                low, high = counts[4 * k] | counts[4 * k + 1] << 2, counts[4 * k + 2] | counts[4 * k + 3] << 2
                codes[row, k] = low | high << 4


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def count_midpoints(values: Any, midpoints: Any, inverse: Any, counts: Any, length: int) -> None:
    """How many midpoints lie strictly below every value times ``inverse``."""
    for k in range(length):
        scaled = from_bits(values[k]) * inverse
        count = np.uint8(0)
        for j in range(15):
            count += np.uint8(scaled > midpoints[j])
        counts[k] = count


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def count_zero(midpoints: Any) -> int:
    """The code of zero."""
    count = 0
    for j in range(15):
        count += midpoints[j] < 0
    return count
