"""Packing weights into GGUF's k-quants on the CPU, byte for byte as ggml's reference does.

Arrays of a kernel: ``values`` float32, flat, whole rows; ``importance`` float32, of one row, or empty; ``data`` uint8,
flat, written.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from ingle.kernels.cpu_cache import compile_kernel
from ingle.kernels.ggml_block import (
    find_largest_scale,
    lay_out,
    lay_out_importance,
    nearest,
    put_half,
    share,
    sum_squares,
)
from ingle.kernels.ggml_lanes import LANES, TINIEST, make_lanes, weigh_32, write_again, write_weights
from ingle.kernels.ggml_search import affine_q4, affine_q5, write_affine, write_descent, write_symmetric

#: The passes and searches of these formats.
affine_q2 = make_lanes(write_affine, count=16, top=3, start=-0.9, step=0.05, steps=36)
affine_q4_plain = make_lanes(write_affine, count=32, top=15, start=-1.0, step=0.1, steps=20)
affine_q5_plain = make_lanes(write_affine, count=32, top=31, start=-0.5, step=0.1, steps=15)
affine_q2_plain = make_lanes(write_affine, count=16, top=3, start=-0.5, step=0.1, steps=15, absolute=True)
symmetric_q6 = make_lanes(write_symmetric, count=16, top=32)
symmetric_q3 = make_lanes(write_symmetric, count=16, top=4)
symmetric_scales = make_lanes(write_symmetric, count=16, top=32)
descend_q3 = make_lanes(write_descent, count=16, top=4)
weigh_mean = make_lanes(write_weights, count=32, kind="mean")
weigh_size = make_lanes(write_weights, count=16, kind="size")
weigh_square = make_lanes(write_weights, count=16, kind="square")
weigh_16 = make_lanes(write_weights, count=16, kind="importance")
again_q4 = make_lanes(write_again, count=32, low=0, high=15)
again_q5 = make_lanes(write_again, count=32, low=0, high=31)
again_q2 = make_lanes(write_again, count=16, low=0, high=3)
again_q3 = make_lanes(write_again, count=16, low=-4, high=3)
again_q6 = make_lanes(write_again, count=16, low=-32, high=31)


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


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_scales_and_mins(fields: Any, block: int, weighted: bool, levels: Any, lows: Any, data: Any, to: int) -> None:
    """The scales of one Q4_K or Q5_K block: 16 bytes; fields 0 and 1 become what its codes are relative to."""
    first = 8 * block
    if weighted:
        weights = fields[2 * LANES + first : 2 * LANES + first + 8]
        scale = search_positive(fields, first, 8, 63, weights, levels)
        minimum = search_positive(fields, LANES + first, 8, 63, weights, lows)
    else:
        scale = find_scales_plain(fields, first, 8, 63, 0, levels)
        minimum = find_scales_plain(fields, first, 8, 63, 1, lows)
    scale, minimum = put_half(scale, data, to), put_half(minimum, data, to + 2)
    for k in range(4):
        data[to + 4 + k] = levels[k] | (levels[k + 4] >> 4) << 6
        data[to + 8 + k] = lows[k] | (lows[k + 4] >> 4) << 6
        data[to + 12 + k] = (levels[k + 4] & 15) | (lows[k + 4] & 15) << 4
    for k in range(8):
        fields[first + k] = scale * np.float32(levels[k])
        fields[LANES + first + k] = minimum * np.float32(lows[k])


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q4_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_K_ref``, or ``_impl`` with importance: groups of two blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(8, np.int64), np.zeros(8, np.int64)
    for group in range(first, stop):
        at = group * 512
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_block(values, importance, at, 32, num_lanes, 2, w, fields)
            weigh_32(x, w, fields, codes)
            affine_q4(x, w, fields, codes)
        else:
            weigh_mean(x, w, fields, codes)
            affine_q4_plain(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 144
            put_scales_and_mins(fields, block, importance.size > 0, levels, lows, data, to)
        again_q4(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 144
            for k in range(128):
                pair, byte = k // 32, k % 32
                lane = 8 * block + 2 * pair
                data[to + 16 + k] = codes[byte * LANES + lane] | codes[byte * LANES + lane + 1] << np.uint8(4)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q5_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_K_ref``, or ``_impl`` with importance: groups of two blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(8, np.int64), np.zeros(8, np.int64)
    for group in range(first, stop):
        at = group * 512
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_block(values, importance, at, 32, num_lanes, 2, w, fields)
            weigh_32(x, w, fields, codes)
            affine_q5(x, w, fields, codes)
        else:
            weigh_mean(x, w, fields, codes)
            affine_q5_plain(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 176
            put_scales_and_mins(fields, block, importance.size > 0, levels, lows, data, to)
        again_q5(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 176
            for byte in range(32):
                high = np.uint8(0)
                for lane in range(8):
                    high |= (codes[byte * LANES + 8 * block + lane] >> np.uint8(4)) << np.uint8(lane)
                data[to + 16 + byte] = high
                for pair in range(4):
                    lane = 8 * block + 2 * pair
                    low = codes[byte * LANES + lane] & np.uint8(15)
                    data[to + 48 + 32 * pair + byte] = low | codes[byte * LANES + lane + 1] << np.uint8(4)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_pairs(codes: Any, data: Any, to: int) -> None:
    """Packs 256 codes of two bits, 16 sub-blocks of 16 side by side, into 64 bytes."""
    for half in range(2):
        for byte in range(32):
            packed = np.uint8(0)
            for quarter in range(4):
                lane = 8 * half + 2 * quarter + byte // 16
                packed |= (codes[(byte % 16) * LANES + lane] & np.uint8(3)) << np.uint8(2 * quarter)
            data[to + 32 * half + byte] = packed


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q2_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q2_K_ref``, or ``_impl`` with importance: one block a group."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(16, np.int64), np.zeros(16, np.int64)
    for block in range(first, stop):
        at, to = 256 * block, 84 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            weigh_by_block(values, importance, at, 16, LANES, 1, w, fields)
            weigh_16(x, w, fields, codes)
            affine_q2(x, w, fields, codes)
            weights = fields[2 * LANES :]
            scale = search_positive(fields, 0, 16, 15, weights, levels)
            minimum = search_positive(fields, LANES, 16, 15, weights, lows)
        else:
            weigh_size(x, w, fields, codes)
            affine_q2_plain(x, w, fields, codes)
            scale = find_scales_plain(fields, 0, 16, 15, 0, levels)
            minimum = find_scales_plain(fields, 0, 16, 15, 1, lows)
        scale, minimum = put_half(scale, data, to + 80), put_half(minimum, data, to + 82)
        for k in range(16):
            data[to + k] = levels[k] | lows[k] << 4
            fields[k] = scale * np.float32(levels[k])
            fields[LANES + k] = minimum * np.float32(lows[k])
        again_q2(x, w, fields, codes)
        put_pairs(codes, data, to + 16)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q3_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q3_K_ref``, or ``_impl`` with importance: one block a group."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields, levels = np.zeros(3 * LANES, np.float32), np.zeros(16, np.int64)
    # The scales of a block as the first of 16 sub-blocks side by side, for the same search.
    scales, weights = np.zeros(16 * LANES, np.float32), np.zeros(16 * LANES, np.float32)
    found, chosen = np.zeros(3 * LANES, np.float32), np.zeros(16 * LANES, np.uint8)
    for block in range(first, stop):
        at, to = 256 * block, 110 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            weigh_by_block(values, importance, at, 16, LANES, 2, w, fields)
            weigh_16(x, w, fields, codes)
            symmetric_q3(x, w, fields, codes)
            for k in range(16):
                scales[k * LANES], weights[k * LANES] = fields[k], fields[2 * LANES + k]
            symmetric_scales(scales, weights, found, chosen)
            scale = found[0]
            for k in range(16):
                levels[k] = chosen[k * LANES]
        else:
            descend_q3(x, w, fields, codes)
            largest = find_largest_scale(fields)
            scale = np.float32(0)
            if largest != 0:
                inverse = np.float32(-32) / largest
                scale = np.float32(1) / inverse
                for k in range(16):
                    levels[k] = max(-32, min(31, nearest(inverse * fields[k]))) + 32
            else:
                levels[:] = 0
        scale = put_half(scale, data, to + 108)
        for k in range(8):
            data[to + 96 + k] = (levels[k] & 15) | (levels[k + 8] & 15) << 4
        for k in range(4):
            high = levels[k] >> 4 | levels[k + 4] >> 4 << 2 | levels[k + 8] >> 4 << 4 | levels[k + 12] >> 4 << 6
            data[to + 104 + k] = high
        for k in range(16):
            fields[k] = scale * np.float32(levels[k] - 32)
            fields[LANES + k] = np.float32(0)
        again_q3(x, w, fields, codes)
        for byte in range(32):
            high_bits = np.uint8(0)
            for part in range(8):
                code = codes[(byte % 16) * LANES + 2 * part + byte // 16]
                high_bits |= (code >> np.uint8(2)) << np.uint8(part)
            data[to + byte] = high_bits
        put_pairs(codes, data, to + 32)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q6_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q6_K_ref``, or ``_impl`` with importance: one block a group."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for block in range(first, stop):
        at, to = 256 * block, 210 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            lay_out_importance(importance, at, 16, LANES, w)
        else:
            weigh_square(x, w, fields, codes)
        symmetric_q6(x, w, fields, codes)
        largest = find_largest_scale(fields)
        if abs(largest) < np.float32(TINIEST):
            data[to : to + 210] = 0
            continue
        inverse = np.float32(-128) / largest
        scale = put_half(np.float32(1) / inverse, data, to + 208)
        for k in range(16):
            level = min(127, nearest(inverse * fields[k]))
            data[to + 192 + k] = np.uint8(level & 255)
            fields[k] = scale * np.float32(level)
            fields[LANES + k] = np.float32(0)
        again_q6(x, w, fields, codes)
        for half in range(2):
            for byte in range(32):
                line, lane = (byte % 16) * LANES, 8 * half + byte // 16
                one, two, three, four = (
                    codes[line + lane],
                    codes[line + lane + 2],
                    codes[line + lane + 4],
                    codes[line + lane + 6],
                )
                low = np.uint8(15)
                data[to + 64 * half + byte] = (one & low) | (three & low) << np.uint8(4)
                data[to + 64 * half + 32 + byte] = (two & low) | (four & low) << np.uint8(4)
                high = one >> np.uint8(4) | two >> np.uint8(4) << np.uint8(2)
                high |= three >> np.uint8(4) << np.uint8(4) | four >> np.uint8(4) << np.uint8(6)
                data[to + 128 + 32 * half + byte] = high


@compile_kernel
def encode_q2_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q2_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q2_k(values, importance, data, first, stop)


@compile_kernel
def encode_q3_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q3_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q3_k(values, importance, data, first, stop)


@compile_kernel
def encode_q4_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q4_k(values, importance, data, first, stop)


@compile_kernel
def encode_q5_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q5_k(values, importance, data, first, stop)


@compile_kernel
def encode_q6_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q6_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q6_k(values, importance, data, first, stop)
