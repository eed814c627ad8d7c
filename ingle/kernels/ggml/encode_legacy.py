"""Packing weights into GGUF's blocks of 32 on the CPU, byte for byte as ggml's reference does.

Arrays of a kernel: ``values`` float32, flat, whole rows; ``importance`` float32, of one row, or empty; ``data`` uint8,
flat, written.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from ingle.kernels.ggml.block import lay_out, lay_out_importance, put_half, put_nibbles, share, sum_squares
from ingle.kernels.ggml.encode_block import pack_q4_0, pack_q4_1, pack_q5_0, pack_q5_1, pack_q8_0
from ingle.kernels.ggml.lanes import LANES, make_lanes, weigh_32
from ingle.kernels.ggml.search import affine_q4, affine_q5, write_symmetric
from ingle.kernels.numba.cache import compile_kernel

#: The searches of these formats.
symmetric_q4 = make_lanes(write_symmetric, count=32, top=8)
symmetric_q5 = make_lanes(write_symmetric, count=32, top=16)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def weigh_by_row(
    values: Any, importance: Any, at: int, num_lanes: int, known: Any, x: Any, w: Any, fields: Any, codes: Any
) -> None:
    """Weights of 16 blocks of 32 by importance and the mean square of their row; ``known`` is a row and its mean."""
    lay_out_importance(importance, at, 32, num_lanes, w)
    num_columns = importance.size
    for lane in range(num_lanes):
        row = (at + 32 * lane) // num_columns
        if known[0] != row:
            known[0] = row
            known[1] = sum_squares(values, row * num_columns, num_columns) / np.float32(num_columns)
        fields[lane] = known[1]
    weigh_32(x, w, fields, codes)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_fifth_bits(codes: Any, lane: int, data: Any, at: int) -> None:
    """Packs the fifth bits of 32 codes into four bytes."""
    for byte in range(4):
        bits = np.uint8(0)
        for k in range(8):
            bits |= ((codes[(8 * byte + k) * LANES + lane] >> np.uint8(4)) & np.uint8(1)) << np.uint8(k)
        data[at + byte] = bits


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_q4_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_0_impl``: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
        symmetric_q4(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 18
            put_half(fields[lane], data, to)
            put_nibbles(codes, lane, data, to + 2)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_q4_1(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_1_impl``: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
        affine_q4(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 20
            put_half(fields[lane], data, to)
            put_half(-fields[LANES + lane], data, to + 2)
            put_nibbles(codes, lane, data, to + 4)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_q5_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_0_impl``: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
        symmetric_q5(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 22
            put_half(fields[lane], data, to)
            put_fifth_bits(codes, lane, data, to + 2)
            put_nibbles(codes, lane, data, to + 6)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_q5_1(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_1_impl``: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
        affine_q5(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 24
            put_half(fields[lane], data, to)
            put_half(-fields[LANES + lane], data, to + 2)
            put_fifth_bits(codes, lane, data, to + 4)
            put_nibbles(codes, lane, data, to + 8)


@compile_kernel
def encode_q4_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        if importance.size:
            first, stop = share(chunk, -(-values.size // 512), num_chunks)
            search_q4_0(values, importance, data, first, stop)
        else:
            fields = np.empty(2, np.float32)
            first, stop = share(chunk, values.size // 32, num_chunks)
            for block in range(first, stop):
                pack_q4_0(values, block * 32, fields, data, block * 18)
                put_half(fields[0], data, block * 18)


@compile_kernel
def encode_q4_1(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_1; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        if importance.size:
            first, stop = share(chunk, -(-values.size // 512), num_chunks)
            search_q4_1(values, importance, data, first, stop)
        else:
            fields = np.empty(2, np.float32)
            first, stop = share(chunk, values.size // 32, num_chunks)
            for block in range(first, stop):
                pack_q4_1(values, block * 32, fields, data, block * 20)
                put_half(fields[0], data, block * 20)
                put_half(fields[1], data, block * 20 + 2)


@compile_kernel
def encode_q5_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        if importance.size:
            first, stop = share(chunk, -(-values.size // 512), num_chunks)
            search_q5_0(values, importance, data, first, stop)
        else:
            fields = np.empty(2, np.float32)
            first, stop = share(chunk, values.size // 32, num_chunks)
            for block in range(first, stop):
                pack_q5_0(values, block * 32, fields, data, block * 22)
                put_half(fields[0], data, block * 22)


@compile_kernel
def encode_q5_1(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_1; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        if importance.size:
            first, stop = share(chunk, -(-values.size // 512), num_chunks)
            search_q5_1(values, importance, data, first, stop)
        else:
            fields = np.empty(2, np.float32)
            first, stop = share(chunk, values.size // 32, num_chunks)
            for block in range(first, stop):
                pack_q5_1(values, block * 32, fields, data, block * 24)
                put_half(fields[0], data, block * 24)
                put_half(fields[1], data, block * 24 + 2)


@compile_kernel
def encode_q8_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q8_0; arrays as the module says, in ``num_chunks`` parts; importance is not used."""
    for chunk in prange(num_chunks):
        fields = np.empty(1, np.float32)
        first, stop = share(chunk, values.size // 32, num_chunks)
        for block in range(first, stop):
            pack_q8_0(values, block * 32, fields, data, block * 34)
            put_half(fields[0], data, block * 34)
