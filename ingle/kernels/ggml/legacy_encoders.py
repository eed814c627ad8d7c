"""Encoders of GGUF's blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, byte for byte as ggml's.

Without importance, the scale follows from the extreme weights, and each block is processed in the order of operations
of ggml's reference. With importance, scales are searched for 16 blocks side by side.

Source: ggml's ``ggml-quants.c`` (MIT license); docstrings name the corresponding functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from ingle.kernels.ggml import search
from ingle.kernels.ggml.sub_blocks import (
    LANES,
    lay_out,
    lay_out_importance,
    make_lanes,
    put_half,
    put_nibbles,
    sum_squares,
    weigh_32,
)
from ingle.kernels.numba.scalars import inlined
from ingle.kernels.numba.vector import ARRAY, BYTE, FLOAT, OFFSET, Array, Vector, make_intrinsic, splat

#: Weights of a block.
COUNT = 32
#: Parameters of a function that encodes a block: values, fields (scale and minimum) and bytes.
BLOCK = (ARRAY, OFFSET, ARRAY, ARRAY, OFFSET)


def fold(values: Vector, choose: Callable[[Vector, Vector], Vector]) -> Vector:
    """Returns the element that repeated pairwise choices select."""
    while values.count > 1:
        values = choose(values[::2], values[1::2])
    return values


def least(values: Vector) -> Vector:
    """Returns the first of the lowest values."""
    return fold(values, lambda left, right: (right < left).choose(right, left))


def most(values: Vector) -> Vector:
    """Returns the first of the highest values."""
    return fold(values, lambda left, right: (right > left).choose(right, left))


def largest(x: Array, values: Vector) -> Vector:
    """Returns the first value of largest magnitude, with its sign; positive zero if all are zero."""
    builder, size = x.builder, values.size()
    top = most(size)
    found = builder.bitcast(size.same(top.spread(0, COUNT)).value, ir.IntType(COUNT))
    number = builder.zext(builder.cttz(found, ir.IntType(1)(1)), ir.IntType(64))
    value = splat(builder, x.scalar(number, FLOAT), 1)
    return top.same(0.0).choose(0.0, value)


def invert(scale: Vector) -> Vector:
    """Returns ``1 / scale``, or zero for a scale of zero."""
    return scale.same(0.0).choose(0.0, 1.0 / scale)


def store_block(data: Array, steps: Vector, top: int, high: int | None, low: int) -> None:
    """Stores codes up to ``top``: their low four bits from byte ``low`` on, their fifth bits from byte ``high`` on."""
    codes = steps.at_least(0.0).at_most(float(top)).to_int().narrow(BYTE)
    if high is not None:
        data.store(high, (codes & 16).same(16).view(BYTE))
    data.store(low, (codes[:16] & 15) | (codes[16:] << 4))


def emit_symmetric(x: Array, fields: Array, data: Array, *, top: int, high: int | None, low: int) -> None:
    """``quantize_row_q4_0_ref`` and ``q5_0``: the weight of largest magnitude becomes the lowest code."""
    values = x.load(0, COUNT)
    scale = largest(x, values) / float(-(top + 1) // 2)
    store_block(data, values * invert(scale).spread(0, COUNT) + (top / 2 + 1), top, high, low)
    fields.store(0, scale)


def emit_affine(x: Array, fields: Array, data: Array, *, top: int, high: int | None, low: int) -> None:
    """``quantize_row_q4_1_ref`` and ``q5_1``: codes from the lowest weight to the highest."""
    values = x.load(0, COUNT)
    bottom = least(values)
    scale = (most(values) - bottom) / float(top)
    steps = (values - bottom.spread(0, COUNT)) * invert(scale).spread(0, COUNT) + 0.5
    store_block(data, steps, top, high, low)
    fields.store(0, scale.join(bottom))


def emit_q8_0(x: Array, fields: Array, data: Array) -> None:
    """``quantize_row_q8_0_ref``: the largest magnitude becomes 127; ties round away from zero."""
    values = x.load(0, COUNT)
    scale = most(values.size()) / 127.0
    steps = (values * invert(scale).spread(0, COUNT)).at_least(-127.0).at_most(127.0)
    data.store(2, steps.round_half_away().to_int().narrow(BYTE))
    fields.store(0, scale)


@inlined
def weigh_by_row(
    values: Any, importance: Any, at: int, num_lanes: int, known: Any, x: Any, w: Any, fields: Any, codes: Any
) -> None:
    """Computes the weights of 16 blocks from importance and the mean square of the row, which ``known`` caches."""
    lay_out_importance(importance, at, 32, num_lanes, w)
    num_columns = importance.size
    for lane in range(num_lanes):
        row = (at + 32 * lane) // num_columns
        if known[0] != row:
            known[0] = row
            known[1] = sum_squares(values, row * num_columns, num_columns) / np.float32(num_columns)
        fields[lane] = known[1]
    weigh_32(x, w, fields, codes)


@inlined
def put_fifth_bits(codes: Any, lane: int, data: Any, at: int) -> None:
    """Stores the fifth bits of 32 codes in four bytes."""
    for byte in range(4):
        bits = np.uint8(0)
        for k in range(8):
            bits |= ((codes[(8 * byte + k) * LANES + lane] >> np.uint8(4)) & np.uint8(1)) << np.uint8(k)
        data[at + byte] = bits


def make_legacy(*, block_bytes: int, top: int, low: int, high: int | None = None, affine: bool = False) -> Any:
    """Returns the encoder ``quantize_q4_0``, ``q4_1``, ``q5_0`` or ``q5_1``, which works in groups of 16 blocks.

    Args:
        block_bytes: Bytes of a block.
        top: The highest code.
        low: First byte with four bits of each code.
        high: First byte with the fifth bits.
        affine: Whether a block has a minimum.
    """
    encode_block = make_intrinsic(emit_affine if affine else emit_symmetric, BLOCK, top=top, high=high, low=low)
    find_symmetric = make_lanes(search.emit_symmetric, count=32, top=top // 2 + 1)
    find_scales = make_lanes(search.emit_affine, count=32, top=top) if affine else find_symmetric
    has_fifth, fifth = high is not None, high or 0

    @inlined
    def encode_groups(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
        x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
        fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
        for group in range(first, stop):
            at = group * 32 * LANES
            num_lanes = min(LANES, (values.size - at) // 32)
            if importance.size:
                lay_out(values, at, 32, num_lanes, x)
                weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
                find_scales(x, w, fields, codes)
            for lane in range(num_lanes):
                to = (group * LANES + lane) * block_bytes
                if importance.size:
                    put_half(fields[lane], data, to)
                    if affine:
                        put_half(-fields[LANES + lane], data, to + 2)
                    if has_fifth:
                        put_fifth_bits(codes, lane, data, to + fifth)
                    put_nibbles(codes, lane, data, to + low)
                else:
                    encode_block(values, at + 32 * lane, fields, data, to)
                    put_half(fields[0], data, to)
                    if affine:
                        put_half(fields[1], data, to + 2)

    return encode_groups


_encode_q8_0_block = make_intrinsic(emit_q8_0, BLOCK)


@inlined
def encode_q8_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_q8_0``, one block after the other; importance is not used."""
    fields = np.empty(1, np.float32)
    for block in range(first, stop):
        _encode_q8_0_block(values, block * 32, fields, data, block * 34)
        put_half(fields[0], data, block * 34)


#: By ``base.format``: what encodes some groups of weights, and the weights of a group.
LEGACY_FORMATS = {
    "q4_0": (make_legacy(block_bytes=18, top=15, low=2), 32 * LANES),
    "q4_1": (make_legacy(block_bytes=20, top=15, low=4, affine=True), 32 * LANES),
    "q5_0": (make_legacy(block_bytes=22, top=31, low=6, high=2), 32 * LANES),
    "q5_1": (make_legacy(block_bytes=24, top=31, low=8, high=4, affine=True), 32 * LANES),
    "q8_0": (encode_q8_0, 32),
}
