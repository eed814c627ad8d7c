"""Decoders of GGUF's formats IQ1 to IQ3: a code selects a row of a grid, which is four or eight weights.

Each ``emit_...`` emits the code that decodes one block, as in :mod:`ingle.kernels.ggml.decoders`.

Source: ggml's ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (``dequantize_row_...``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir

from ingle.kernels.numba.vector import BYTE, DWORD, FLOAT, WORD, Array, Vector, splat

#: IQ1 shifts its weights by this, up or down.
DELTA = 0.125


def gather(grid: Array, numbers: Vector, width: int) -> Vector:
    """Returns the grid rows with these numbers, one after the other, as bytes."""
    builder, size, row = grid.builder, ir.IntType(64), ir.IntType(8 * width)
    joined = ir.Constant(ir.VectorType(row, numbers.count), ir.Undefined)
    for place in range(numbers.count):
        number = builder.zext(builder.extract_element(numbers.value, DWORD(place)), size)
        loaded = grid.scalar(builder.mul(number, size(width)), row)
        joined = builder.insert_element(joined, loaded, DWORD(place))
    return Vector(builder, joined).view(BYTE)


def complete(signs: Vector) -> Vector:
    """Adds an eighth sign to bytes of seven, so that the number of minus signs is even."""
    odd = signs ^ (signs >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    return (signs | (odd << 7)).narrow(BYTE)


def store_signed(out: Array, to: int, weights: Vector, scale: Vector, signs: Vector) -> None:
    """Stores grid values times their scale, each negated if its bit in ``signs`` is set."""
    values = weights.to_float(signed=True) * scale
    negative = (values.bits() ^ 0x80000000).from_bits()
    out.store(to, signs.view(ir.IntType(1)).choose(negative, values))


def scale_fields(data: Array, first: int, count: int, factor: float) -> Vector:
    """Returns ``(d * (field + 0.5)) * factor`` of 4-bit fields."""
    raw = data.load(first, count // 2)
    fields = (raw & 15).weave(raw >> 4)
    scale: Vector = (fields.to_float() + 0.5) * data.half(0) * factor
    return scale


def emit_xxs(data: Array, grid: Array, out: Array, *, signs: int, stride: int, width: int, factor: float) -> None:
    """``d * (scale + 0.5) * factor * row``: 32 weights share four times seven signs and a 4-bit scale.

    The signs begin at byte ``signs``, every ``stride`` bytes; a row of the grid has ``width`` weights.
    """
    for part in range(8):
        word = splat(data.builder, data.scalar(signs + stride * part, DWORD), 4)
        scale = ((word >> 28).to_float() + 0.5) * data.half(0) * factor
        rows = gather(grid, data.load(2 + 8 * part, 32 // width), width)
        store_signed(out, 32 * part, rows, scale.spread(0, 32), complete((word >> [0, 7, 14, 21]) & 127))


def emit_iq2_xs(data: Array, grid: Array, out: Array) -> None:
    """``d * (scale + 0.5) / 4 * row``: codes of nine bits with seven signs, a scale for 16."""
    scale = scale_fields(data, 66, 16, 0.25)
    for part in range(8):
        words = data.load(2 + 8 * part, 4, WORD)
        scales = scale.spread(2 * part, 16).join(scale.spread(2 * part + 1, 16))
        store_signed(out, 32 * part, gather(grid, words & 511, 8), scales, complete(words >> 9))


def emit_iq2_s(data: Array, grid: Array, out: Array) -> None:
    """``d * (scale + 0.5) / 4 * row``: codes of ten bits, eight signs, a scale for 16."""
    scale = scale_fields(data, 74, 16, 0.25)
    for part in range(8):
        high = splat(data.builder, data.scalar(66 + part, BYTE), 4) >> [0, 2, 4, 6]
        codes = data.load(2 + 4 * part, 4).widen(WORD) | ((high & 3).widen(WORD) << 8)
        scales = scale.spread(2 * part, 16).join(scale.spread(2 * part + 1, 16))
        store_signed(out, 32 * part, gather(grid, codes, 8), scales, data.load(34 + 4 * part, 4))


def emit_iq3_s(data: Array, grid: Array, out: Array) -> None:
    """``d * (2 * scale + 1) * row``: codes of nine bits, eight signs, a scale for 32."""
    raw = data.load(106, 4)
    fields = (raw & 15).weave(raw >> 4)
    scale = ((fields << 1) | 1).to_float() * data.half(0)
    for part in range(8):
        high = splat(data.builder, data.scalar(66 + part, BYTE), 8) >> list(range(8))
        codes = data.load(2 + 8 * part, 8).widen(WORD) | ((high & 1).widen(WORD) << 8)
        rows = gather(grid, codes, 4)
        store_signed(out, 32 * part, rows, scale.spread(part, 32), data.load(74 + 4 * part, 4))


def emit_iq1_s(data: Array, grid: Array, out: Array) -> None:
    """``d * (2 * scale + 1) * (row +- 1/8)``: codes of eleven bits, a scale and a shift for 32."""
    for part in range(8):
        word = splat(data.builder, data.scalar(34 + 2 * part, WORD), 4)
        scale = ((((word >> 12) & 7) << 1) | 1).widen(DWORD).to_float() * data.half(0)
        codes = data.load(2 + 4 * part, 4).widen(WORD) | (((word >> [0, 3, 6, 9]) & 7) << 8)
        shift = (word >> 15).same(0).choose(DELTA, splat(data.builder, FLOAT(-DELTA), 4))
        rows = gather(grid, codes, 8).to_float(signed=True)
        out.store(32 * part, (rows + shift.spread(0, 32)) * scale.spread(0, 32))


def emit_iq1_m(data: Array, grid: Array, out: Array) -> None:
    """``d * (2 * scale + 1) * (row +- 1/8)``: codes of eleven bits, a scale for 16, a shift for 8; d in four parts."""
    words = data.load(48, 4, WORD)
    parts = (words & 0xF000) >> [12, 8, 4, 0]
    builder = data.builder
    bits = builder.extract_element(parts.value, DWORD(0))
    for place in range(1, 4):
        bits = builder.or_(bits, builder.extract_element(parts.value, DWORD(place)))
    d = data.half_of(bits)
    for part in range(8):
        fields = words.spread(part // 2, 2) >> [6 * (part % 2), 6 * (part % 2) + 3]
        scale = (((fields & 7) << 1) | 1).to_float() * d
        raw = data.load(32 + 2 * part, 2)
        high = (raw & 15).weave(raw >> 4)
        codes = data.load(4 * part, 4).widen(WORD) | ((high & 7).widen(WORD) << 8)
        shift = (high & 8).same(0).choose(DELTA, splat(builder, FLOAT(-DELTA), 4))
        rows = gather(grid, codes, 8).to_float(signed=True)
        shifts = shift.take([place // 8 for place in range(32)])
        scales = scale.spread(0, 16).join(scale.spread(1, 16))
        out.store(32 * part, (rows + shifts) * scales)


#: By ``base.format``: the function that decodes a block, and the number of bytes and weights in a block.
GRID_FORMATS: dict[str, tuple[Callable[..., None], int, int]] = {
    "iq2_xxs": (partial(emit_xxs, signs=6, stride=8, width=8, factor=0.25), 66, 256),
    "iq2_xs": (emit_iq2_xs, 74, 256),
    "iq2_s": (emit_iq2_s, 82, 256),
    "iq3_xxs": (partial(emit_xxs, signs=66, stride=4, width=4, factor=0.5), 98, 256),
    "iq3_s": (emit_iq3_s, 110, 256),
    "iq1_s": (emit_iq1_s, 50, 256),
    "iq1_m": (emit_iq1_m, 56, 256),
}
