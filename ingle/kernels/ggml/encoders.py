"""Encoders of GGUF's block formats on the CPU: one numba kernel per format, equal to ggml's reference byte for byte.

This module contains the kernels, and the encoders of IQ4_NL, IQ4_XS, TQ1_0 and TQ2_0.

Source: ggml's ``ggml-quants.c`` (MIT license); docstrings name the corresponding functions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import prange

from ingle.kernels.ggml import search
from ingle.kernels.ggml.k_encoders import K_FORMATS
from ingle.kernels.ggml.legacy_encoders import LEGACY_FORMATS
from ingle.kernels.ggml.sub_blocks import (
    LANES,
    emit_trits,
    emit_weights,
    find_largest_scale,
    lay_out,
    lay_out_importance,
    make_lanes,
    nearest,
    put_half,
    put_nibbles,
    sum_squares,
    weigh_32,
)
from ingle.kernels.numba.cache import Kernel, compile_kernel
from ingle.kernels.numba.scalars import chunk_bounds, inlined
from ingle.kernels.numba.vector import BYTE, DWORD, Array, fill, repeat

find_levels = make_lanes(search.emit_levels, count=32, tries=7)
find_nearest = make_lanes(search.emit_nearest, count=32)
weigh_square = make_lanes(emit_weights, count=32, kind="square")


@inlined
def weigh_levels(
    values: Any, importance: Any, at: int, size: int, num_lanes: int, x: Any, w: Any, fields: Any, codes: Any
) -> None:
    """Computes the weights of the errors of 16 sub-blocks of 32, in blocks of ``size``."""
    if importance.size:
        lay_out_importance(importance, at, 32, num_lanes, w)
        for block in range(num_lanes * 32 // size):
            energy = sum_squares(values, at + size * block, size) * (np.float32(2) / np.float32(size))
            for lane in range(size // 32):
                fields[block * (size // 32) + lane] = energy
        weigh_32(x, w, fields, codes)
    else:
        weigh_square(x, w, fields, codes)


@inlined
def encode_iq4_nl(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_iq4_nl``: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_levels(values, importance, at, 32, num_lanes, x, w, fields, codes)
        find_levels(x, w, fields, codes)
        for lane in range(num_lanes):
            put_half(fields[lane], data, (group * LANES + lane) * 18)
            fields[lane] = np.float32(1) / fields[lane] if fields[lane] != 0 else np.float32(0)
        find_nearest(x, w, fields, codes)
        for lane in range(num_lanes):
            put_nibbles(codes, lane, data, (group * LANES + lane) * 18 + 2)


@inlined
def encode_iq4_xs(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_iq4_xs``: groups of two blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 512
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_levels(values, importance, at, 256, num_lanes, x, w, fields, codes)
        find_levels(x, w, fields, codes)
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
        find_nearest(x, w, fields, codes)
        for lane in range(num_lanes):
            put_nibbles(codes, lane, data, (2 * group + lane // 8) * 136 + 8 + 16 * (lane % 8))


def emit_trit_bytes(x: Array, w: Array, fields: Array, codes: Array) -> None:
    """Replaces the first 52 of 256 codes by the bytes of TQ1_0: 160 + 80 weights with five per byte, 16 with four."""

    def combine(first: int, width: int, to: int, count: int, index: Any) -> None:
        lanes = index.type(LANES)
        value = fill(codes.builder, 0.0, LANES).to_int()
        for number in range(5):
            value = value * 3
            if number < count:
                row = codes.builder.add(index, index.type(first + width * number))
                value = value + codes.load(codes.builder.mul(row, lanes), LANES).widen(DWORD)
        quotient = ((value * 256 + 242) * 69043) >> 24  # divided by 243, exact below 2^16
        row = codes.builder.add(index, index.type(to))
        codes.store(codes.builder.mul(row, lanes), quotient.narrow(BYTE))

    for segment in ((0, 32, 0, 5), (160, 16, 32, 5), (240, 4, 48, 4)):
        repeat(codes.builder, segment[1], partial(combine, *segment))


make_trit_bytes = make_lanes(emit_trit_bytes)


@inlined
def put_tq1_0(codes: Any, lane: int, data: Any, to: int) -> None:
    """Stores the bytes that ``emit_trit_bytes`` computed."""
    for byte in range(52):
        data[to + byte] = codes[byte * LANES + lane]


@inlined
def put_tq2_0(codes: Any, lane: int, data: Any, to: int) -> None:
    """Stores 256 trits in 64 bytes."""
    for byte in range(64):
        start, value = 128 * (byte // 32) + byte % 32, np.uint8(0)
        for quarter in range(4):
            value |= codes[(start + 32 * quarter) * LANES + lane] << np.uint8(2 * quarter)
        data[to + byte] = value


def make_ternary(put_codes: Any, num_bytes: int) -> Any:
    """Returns the encoder ``quantize_row_tq1_0_ref`` or ``tq2_0``, in groups of 16 blocks; importance is not used.

    Args:
        put_codes: Stores the codes of a block.
        num_bytes: Bytes of these codes; the scale follows.
    """
    find_trits = make_lanes(emit_trits, count=256)
    five_to_a_byte = num_bytes == 52

    @inlined
    def encode_groups(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
        x, codes = np.empty(256 * LANES, np.float32), np.empty(256 * LANES, np.uint8)
        fields = np.zeros(LANES, np.float32)
        for group in range(first, stop):
            at = group * 256 * LANES
            num_lanes = min(LANES, (values.size - at) // 256)
            lay_out(values, at, 256, num_lanes, x)
            find_trits(x, x, fields, codes)
            if five_to_a_byte:
                make_trit_bytes(x, x, fields, codes)
            for lane in range(num_lanes):
                to = (group * LANES + lane) * (num_bytes + 2)
                put_codes(codes, lane, data, to)
                put_half(fields[lane], data, to + num_bytes)

    return encode_groups


#: By ``base.format``: the function that encodes some groups of weights, and the number of weights in a group.
FORMATS = {
    **LEGACY_FORMATS,
    **K_FORMATS,
    "iq4_nl": (encode_iq4_nl, 512),
    "iq4_xs": (encode_iq4_xs, 512),
    "tq1_0": (make_ternary(put_tq1_0, 52), 4096),
    "tq2_0": (make_ternary(put_tq2_0, 64), 4096),
}


def make_encoder(name: str, encode_groups: Any, group_size: int) -> Kernel:
    """Returns the kernel of one format.

    Its arrays: ``values`` float32, flat, complete rows; ``importance`` float32, of one row, or empty; ``data`` uint8,
    flat, written. Threads work on ``num_chunks`` parts.
    """

    def encode(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
        for chunk in prange(num_chunks):
            first, stop = chunk_bounds(chunk, -(-values.size // group_size), num_chunks)
            encode_groups(values, importance, data, first, stop)

    return compile_kernel(encode, name=f"encode_{name}")


#: The kernels by ``base.format``.
KERNELS = {name: make_encoder(name, *encoder) for name, encoder in FORMATS.items()}
