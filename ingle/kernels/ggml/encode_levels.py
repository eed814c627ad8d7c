"""Packing weights into GGUF's formats of non-linear levels on the CPU, byte for byte as ggml's reference does.

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
    put_nibbles,
    share,
    sum_squares,
)
from ingle.kernels.ggml.lanes import LANES, make_lanes, weigh_32, write_weights
from ingle.kernels.ggml.search import write_levels, write_nearest
from ingle.kernels.numba.cache import compile_kernel

#: The passes and searches of these formats.
levels_32 = make_lanes(write_levels, count=32, tries=7)
nearest_32 = make_lanes(write_nearest, count=32)
weigh_square_32 = make_lanes(write_weights, count=32, kind="square")


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def weigh_levels(
    values: Any, importance: Any, at: int, size: int, num_lanes: int, x: Any, w: Any, fields: Any, codes: Any
) -> None:
    """Weights of 16 sub-blocks of 32 as the non-linear formats have them: by importance and block of ``size``."""
    if importance.size:
        lay_out_importance(importance, at, 32, num_lanes, w)
        for block in range(num_lanes * 32 // size):
            energy = sum_squares(values, at + size * block, size) * (np.float32(2) / np.float32(size))
            for lane in range(size // 32):
                fields[block * (size // 32) + lane] = energy
        weigh_32(x, w, fields, codes)
    else:
        weigh_square_32(x, w, fields, codes)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_iq4_nl(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_iq4_nl``: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_levels(values, importance, at, 32, num_lanes, x, w, fields, codes)
        levels_32(x, w, fields, codes)
        for lane in range(num_lanes):
            put_half(fields[lane], data, (group * LANES + lane) * 18)
            fields[lane] = np.float32(1) / fields[lane] if fields[lane] != 0 else np.float32(0)
        nearest_32(x, w, fields, codes)
        for lane in range(num_lanes):
            put_nibbles(codes, lane, data, (group * LANES + lane) * 18 + 2)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_iq4_xs(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_iq4_xs``: groups of two blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 512
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_levels(values, importance, at, 256, num_lanes, x, w, fields, codes)
        levels_32(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 136
            largest = find_largest_scale(fields[8 * block : 8 * block + 8])
            scale = -largest / np.float32(32)
            put_half(scale, data, to)
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            high = np.int64(0)
            for k in range(8):
                level = max(-32, min(31, nearest(inverse * fields[8 * block + k])))
                product = scale * np.float32(level)
                fields[8 * block + k] = np.float32(1) / product if product != 0 else np.float32(0)
                level += 32
                high |= level >> 4 << 2 * k
                kept = data[to + 4 + k // 2] if k % 2 else np.uint8(0)
                data[to + 4 + k // 2] = kept | (level & 15) << 4 * (k % 2)
            data[to + 2], data[to + 3] = high & 255, high >> 8
        nearest_32(x, w, fields, codes)
        for lane in range(num_lanes):
            put_nibbles(codes, lane, data, (2 * group + lane // 8) * 136 + 8 + 16 * (lane % 8))


@compile_kernel
def encode_iq4_nl(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs IQ4_NL; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_iq4_nl(values, importance, data, first, stop)


@compile_kernel
def encode_iq4_xs(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs IQ4_XS; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_iq4_xs(values, importance, data, first, stop)
