"""Packing weights into the k-quants with offsets, Q2_K, Q4_K and Q5_K, on the CPU, byte for byte as ggml does.

Arrays of a kernel: ``values`` float32, flat, whole rows; ``importance`` float32, of one row, or empty; ``data`` uint8,
flat, written.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from ingle.kernels.ggml.block import lay_out, put_half, put_pairs, share
from ingle.kernels.ggml.lanes import LANES, make_lanes, weigh_32, write_again, write_weights
from ingle.kernels.ggml.scales import find_scales_plain, search_positive, weigh_by_block
from ingle.kernels.ggml.search import affine_q4, affine_q5, write_affine
from ingle.kernels.numba.cache import compile_kernel

#: The passes and searches of these formats.
affine_q2 = make_lanes(write_affine, count=16, top=3, start=-0.9, step=0.05, steps=36)
affine_q4_plain = make_lanes(write_affine, count=32, top=15, start=-1.0, step=0.1, steps=20)
affine_q5_plain = make_lanes(write_affine, count=32, top=31, start=-0.5, step=0.1, steps=15)
affine_q2_plain = make_lanes(write_affine, count=16, top=3, start=-0.5, step=0.1, steps=15, absolute=True)
weigh_mean = make_lanes(write_weights, count=32, kind="mean")
weigh_size = make_lanes(write_weights, count=16, kind="size")
weigh_16 = make_lanes(write_weights, count=16, kind="importance")
again_q4 = make_lanes(write_again, count=32, low=0, high=15)
again_q5 = make_lanes(write_again, count=32, low=0, high=31)
again_q2 = make_lanes(write_again, count=16, low=0, high=3)


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


@compile_kernel
def encode_q2_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q2_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q2_k(values, importance, data, first, stop)


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
