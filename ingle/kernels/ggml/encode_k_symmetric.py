"""Packing weights into the k-quants without offsets, Q3_K and Q6_K, on the CPU, byte for byte as ggml does.

Arrays of a kernel: ``values`` float32, flat, whole rows; ``importance`` float32, of one row, or empty; ``data`` uint8,
flat, written.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from ingle.kernels.ggml.block import (
    find_largest_scale,
    lay_out,
    lay_out_importance,
    nearest,
    put_half,
    put_pairs,
    share,
)
from ingle.kernels.ggml.lanes import LANES, TINIEST, make_lanes, write_again, write_weights
from ingle.kernels.ggml.scales import weigh_by_block
from ingle.kernels.ggml.search import write_descent, write_symmetric
from ingle.kernels.numba.cache import compile_kernel

#: The passes and searches of these formats.
symmetric_q6 = make_lanes(write_symmetric, count=16, top=32)
symmetric_q3 = make_lanes(write_symmetric, count=16, top=4)
symmetric_scales = make_lanes(write_symmetric, count=16, top=32)
descend_q3 = make_lanes(write_descent, count=16, top=4)
weigh_square = make_lanes(write_weights, count=16, kind="square")
weigh_16 = make_lanes(write_weights, count=16, kind="importance")
again_q3 = make_lanes(write_again, count=16, low=-4, high=3)
again_q6 = make_lanes(write_again, count=16, low=-32, high=31)


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
def encode_q3_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q3_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q3_k(values, importance, data, first, stop)


@compile_kernel
def encode_q6_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q6_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q6_k(values, importance, data, first, stop)
