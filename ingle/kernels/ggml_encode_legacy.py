"""Packing weights into GGUF's blocks of 32 on the CPU, byte for byte as ggml's reference does.

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
    invert_size,
    lay_out,
    lay_out_importance,
    put_half,
    put_nibbles,
    share,
    sum_squares,
)
from ingle.kernels.ggml_lanes import LANES, make_lanes, weigh_32, write_extremes, write_rounds, write_steps
from ingle.kernels.ggml_search import affine_q4, affine_q5, write_symmetric

#: The passes and searches of these formats.
extremes_32 = make_lanes(write_extremes, count=32)
steps_q4 = make_lanes(write_steps, count=32, bias=8.5, top=15)
steps_q4_low = make_lanes(write_steps, count=32, bias=0.5, top=15)
steps_q5 = make_lanes(write_steps, count=32, bias=16.5, top=31)
steps_q5_low = make_lanes(write_steps, count=32, bias=0.5, top=31)
rounds_q8 = make_lanes(write_rounds, count=32, limit=127, bias=0)
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
def invert_symmetric(fields: Any, parts: Any) -> None:
    """``d = largest / -parts``: fields 0 becomes its inverse, 1 zero, 2 keeps d."""
    for lane in range(LANES):
        scale = fields[lane] / np.float32(-parts)
        fields[lane] = np.float32(1) / scale if scale != 0 else np.float32(0)
        fields[LANES + lane] = np.float32(0)
        fields[2 * LANES + lane] = scale


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def invert_affine(fields: Any, parts: Any) -> None:
    """``d = (highest - lowest) / parts``: fields 0 becomes its inverse, 1 stays the lowest, 2 becomes d."""
    for lane in range(LANES):
        scale = (fields[2 * LANES + lane] - fields[LANES + lane]) / np.float32(parts)
        fields[lane] = np.float32(1) / scale if scale != 0 else np.float32(0)
        fields[2 * LANES + lane] = scale


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def take_found(fields: Any) -> None:
    """After a search: field 2 becomes the scale, 1 the minimum."""
    for lane in range(LANES):
        fields[2 * LANES + lane] = fields[lane]
        fields[LANES + lane] = -fields[LANES + lane]


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q4_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_0_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            symmetric_q4(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_symmetric(fields, 8)
            steps_q4(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 18
            put_half(fields[2 * LANES + lane], data, to)
            put_nibbles(codes, lane, data, to + 2)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q4_1(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_1_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            affine_q4(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_affine(fields, 15)
            steps_q4_low(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 20
            put_half(fields[2 * LANES + lane], data, to)
            put_half(fields[LANES + lane], data, to + 2)
            put_nibbles(codes, lane, data, to + 4)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q5_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_0_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            symmetric_q5(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_symmetric(fields, 16)
            steps_q5(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 22
            put_half(fields[2 * LANES + lane], data, to)
            put_fifth_bits(codes, lane, data, to + 2)
            put_nibbles(codes, lane, data, to + 6)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q5_1(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_1_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            affine_q5(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_affine(fields, 31)
            steps_q5_low(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 24
            put_half(fields[2 * LANES + lane], data, to)
            put_half(fields[LANES + lane], data, to + 2)
            put_fifth_bits(codes, lane, data, to + 4)
            put_nibbles(codes, lane, data, to + 8)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q8_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q8_0_ref``: groups of 16 blocks; importance is not used."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(0, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        extremes_32(x, w, fields, codes)
        invert_size(fields, 127)
        rounds_q8(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 34
            put_half(fields[2 * LANES + lane], data, to)
            for k in range(32):
                data[to + 2 + k] = codes[k * LANES + lane]


@compile_kernel
def encode_q4_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q4_0(values, importance, data, first, stop)


@compile_kernel
def encode_q4_1(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_1; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q4_1(values, importance, data, first, stop)


@compile_kernel
def encode_q5_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q5_0(values, importance, data, first, stop)


@compile_kernel
def encode_q5_1(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_1; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q5_1(values, importance, data, first, stop)


@compile_kernel
def encode_q8_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q8_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q8_0(values, importance, data, first, stop)
