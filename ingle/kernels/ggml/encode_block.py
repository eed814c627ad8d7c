"""Packing one block of 32 weights in vector registers: the plain encoders of GGUF's first formats.

Where a scale follows from the largest weights alone nothing has to be searched, and a block is read once, in the order
of operations of ggml's reference.  What is found (the scale, and the least weight) goes to ``fields``, for the caller
to store as float16.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ingle.kernels.numba.vector import BYTE, FLOAT, Array, Vector, fill, splat

#: Weights of a block.
COUNT = 32


def make_pack(write: Callable[..., None], **options: Any) -> Any:
    """A function for kernels, ``pack(values, at, fields, data, to)``, from one that writes the code for a block."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pack(_: Any, values: Any, at: Any, fields: Any, data: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            x = Array(context, builder, kinds[0], arguments[0], arguments[1])
            found = Array(context, builder, kinds[2], arguments[2])
            write(x, found, Array(context, builder, kinds[3], arguments[3], arguments[4]), **options)
            return context.get_dummy_value()

        return types.void(values, at, fields, data, to), generate

    return pack


def fold(values: Vector, choose: Callable[[Vector, Vector], Vector]) -> Vector:
    """One element of all by choices between neighbours, of which the first stands left."""
    while values.count > 1:
        values = choose(values[::2], values[1::2])
    return values


def least(values: Vector) -> Vector:
    """The lowest, the first of several."""
    return fold(values, lambda left, right: (right < left).choose(right, left))


def most(values: Vector) -> Vector:
    """The highest, the first of several."""
    return fold(values, lambda left, right: (right > left).choose(right, left))


def largest(x: Array, values: Vector) -> Vector:
    """The value of largest size, the first of several, with its sign; plain zero where all are zero."""
    builder, size = x.builder, values.size()
    top = most(size)
    found = builder.bitcast(size.same(top.spread(0, COUNT)).value, ir.IntType(COUNT))
    number = builder.zext(builder.cttz(found, ir.IntType(1)(1)), ir.IntType(64))
    value = splat(builder, x.scalar(number, FLOAT), 1)
    return top.same(0.0).choose(0.0, value)


def inverse_of(scale: Vector) -> Vector:
    """``1 / scale``, zero for zero."""
    return scale.same(0.0).choose(0.0, 1.0 / scale)


def store_codes(data: Array, codes: Vector, high: int | None, low: int) -> None:
    """Four bits of every code from byte ``low`` on, 16 codes apart; the fifth bits from byte ``high`` on."""
    if high is not None:
        fifth = (codes & 16).same(16)
        word = codes.builder.bitcast(fifth.value, ir.IntType(COUNT))
        data.store(high, Vector(codes.builder, codes.builder.bitcast(word, ir.VectorType(BYTE, COUNT // 8))))
    data.store(low, (codes[:16] & 15) | (codes[16:] << 4))


def to_codes(steps: Vector, top: int) -> Vector:
    """Whole parts of steps from zero to ``top``, as bytes."""
    return steps.at_least(0.0).at_most(float(top)).to_int().narrow(BYTE)


def write_symmetric(x: Array, fields: Array, data: Array, *, top: int, high: int | None, low: int) -> None:
    """``quantize_row_q4_0_ref`` and ``q5_0``: the weight of largest size becomes the lowest code."""
    values = x.load(0, COUNT)
    scale = largest(x, values) / float(-(top + 1) // 2)
    steps = values * inverse_of(scale).spread(0, COUNT) + (top / 2 + 1)
    store_codes(data, to_codes(steps, top), high, low)
    fields.store(0, scale)


def write_affine(x: Array, fields: Array, data: Array, *, top: int, high: int | None, low: int) -> None:
    """``quantize_row_q4_1_ref`` and ``q5_1``: codes from the lowest weight to the highest."""
    values = x.load(0, COUNT)
    bottom = least(values)
    scale = (most(values) - bottom) / float(top)
    steps = (values - bottom.spread(0, COUNT)) * inverse_of(scale).spread(0, COUNT) + 0.5
    store_codes(data, to_codes(steps, top), high, low)
    fields.store(0, scale.join(bottom))


def write_bytes(x: Array, fields: Array, data: Array) -> None:
    """``quantize_row_q8_0_ref``: the largest size becomes 127; halves go away from zero."""
    values = x.load(0, COUNT)
    scale = most(values.size()) / 127.0
    steps = (values * inverse_of(scale).spread(0, COUNT)).at_least(-127.0).at_most(127.0)
    whole = steps.truncate()
    away = ((steps - whole).size() >= 0.5).choose(1.0, fill(x.builder, 0.0, COUNT))
    data.store(2, (steps < 0.0).choose(whole - away, whole + away).to_int().narrow(BYTE))
    fields.store(0, scale)


pack_q4_0 = make_pack(write_symmetric, top=15, high=None, low=2)
pack_q4_1 = make_pack(write_affine, top=15, high=None, low=4)
pack_q5_0 = make_pack(write_symmetric, top=31, high=2, low=6)
pack_q5_1 = make_pack(write_affine, top=31, high=4, low=8)
pack_q8_0 = make_pack(write_bytes)
