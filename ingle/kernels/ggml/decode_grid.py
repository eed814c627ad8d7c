"""GGUF's IQ1 to IQ3 formats on the CPU, decoded by numba: a code names four or eight weights at once, a row of a grid.

Every ``write_...`` writes the code for one block; see ``ggml_unpack`` for what all of them share.

Source: ggml's ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (``dequantize_row_...``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import prange

from ingle.kernels.ggml.block import share
from ingle.kernels.ggml.grids import read_grid
from ingle.kernels.ggml.unpack import make_grid_unpack
from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.vector import BYTE, DWORD, FLOAT, WORD, Array, Vector, splat

#: What IQ1's weights are shifted by, one way or the other.
DELTA = 0.125


def gather(grid: Array, numbers: Vector, width: int) -> Vector:
    """The rows of these numbers, side by side, as bytes."""
    builder, size, row = grid.builder, ir.IntType(64), ir.IntType(8 * width)
    joined = ir.Constant(ir.VectorType(row, numbers.count), ir.Undefined)
    for place in range(numbers.count):
        number = builder.zext(builder.extract_element(numbers.value, DWORD(place)), size)
        loaded = grid.scalar(builder.mul(number, size(width)), row)
        joined = builder.insert_element(joined, loaded, DWORD(place))
    return Vector(builder, builder.bitcast(joined, ir.VectorType(BYTE, width * numbers.count)))


def flags_of(signs: Vector) -> Vector:
    """The bits of bytes, the lowest first, as a condition."""
    kind = ir.VectorType(ir.IntType(1), 8 * signs.count)
    return Vector(signs.builder, signs.builder.bitcast(signs.value, kind))


def complete(signs: Vector) -> Vector:
    """Bytes of seven signs each and the eighth that makes the number of minus signs even."""
    odd = signs ^ (signs >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    whole: Vector = signs | (odd << 7)
    return whole.narrow(BYTE)


def store_signed(out: Array, to: int, weights: Vector, scale: Vector, signs: Vector) -> None:
    """Stores grid values times their scale, with a bit of ``signs`` each."""
    values = weights.to_float(signed=True) * scale
    negative = (values.bits() ^ 0x80000000).from_bits()
    out.store(to, flags_of(signs).choose(negative, values))


def scale_fields(data: Array, first: int, count: int, factor: float) -> Vector:
    """``(d * (field + 0.5)) * factor`` of four-bit fields."""
    packed = data.load(first, count // 2)
    fields = (packed & 15).weave(packed >> 4)
    scale: Vector = (fields.to_float() + 0.5) * data.half(0) * factor
    return scale


def write_iq2_xxs(data: Array, grid: Array, out: Array) -> None:
    """``d * (scale + 0.5) / 4 * row``: in 32 weights four codes, four times seven signs and four bits of scale."""
    for part in range(8):
        word = splat(data.builder, data.scalar(6 + 8 * part, DWORD), 4)
        scale = ((word >> 28).to_float() + 0.5) * data.half(0) * 0.25
        rows = gather(grid, data.load(2 + 8 * part, 4), 8)
        store_signed(out, 32 * part, rows, scale.spread(0, 32), complete((word >> [0, 7, 14, 21]) & 127))


def write_iq2_xs(data: Array, grid: Array, out: Array) -> None:
    """``d * (scale + 0.5) / 4 * row``: codes of nine bits with seven signs, a scale for 16."""
    scale = scale_fields(data, 66, 16, 0.25)
    for part in range(8):
        words = data.load(2 + 8 * part, 4, WORD)
        scales = scale.spread(2 * part, 16).join(scale.spread(2 * part + 1, 16))
        store_signed(out, 32 * part, gather(grid, words & 511, 8), scales, complete(words >> 9))


def write_iq2_s(data: Array, grid: Array, out: Array) -> None:
    """``d * (scale + 0.5) / 4 * row``: codes of ten bits, eight signs, a scale for 16."""
    scale = scale_fields(data, 74, 16, 0.25)
    for part in range(8):
        high = splat(data.builder, data.scalar(66 + part, BYTE), 4) >> [0, 2, 4, 6]
        codes = data.load(2 + 4 * part, 4).widen(WORD) | ((high & 3).widen(WORD) << 8)
        scales = scale.spread(2 * part, 16).join(scale.spread(2 * part + 1, 16))
        store_signed(out, 32 * part, gather(grid, codes, 8), scales, data.load(34 + 4 * part, 4))


def write_iq3_xxs(data: Array, grid: Array, out: Array) -> None:
    """``d * (scale + 0.5) / 2 * row``: in 32 weights eight codes, four times seven signs and four bits of scale."""
    for part in range(8):
        word = splat(data.builder, data.scalar(66 + 4 * part, DWORD), 4)
        scale = ((word >> 28).to_float() + 0.5) * data.half(0) * 0.5
        rows = gather(grid, data.load(2 + 8 * part, 8), 4)
        store_signed(out, 32 * part, rows, scale.spread(0, 32), complete((word >> [0, 7, 14, 21]) & 127))


def write_iq3_s(data: Array, grid: Array, out: Array) -> None:
    """``d * (2 * scale + 1) * row``: codes of nine bits, eight signs, a scale for 32."""
    packed = data.load(106, 4)
    fields = (packed & 15).weave(packed >> 4)
    scale = ((fields << 1) | 1).to_float() * data.half(0)
    for part in range(8):
        high = splat(data.builder, data.scalar(66 + part, BYTE), 8) >> list(range(8))
        codes = data.load(2 + 8 * part, 8).widen(WORD) | ((high & 1).widen(WORD) << 8)
        rows = gather(grid, codes, 4)
        store_signed(out, 32 * part, rows, scale.spread(part, 32), data.load(74 + 4 * part, 4))


def write_iq1_s(data: Array, grid: Array, out: Array) -> None:
    """``d * (2 * scale + 1) * (row +- 1/8)``: codes of eleven bits, a scale and a shift for 32."""
    for part in range(8):
        word = splat(data.builder, data.scalar(34 + 2 * part, WORD), 4)
        scale = ((((word >> 12) & 7) << 1) | 1).widen(DWORD).to_float() * data.half(0)
        codes = data.load(2 + 4 * part, 4).widen(WORD) | (((word >> [0, 3, 6, 9]) & 7) << 8)
        shift = (word >> 15).same(0).choose(DELTA, splat(data.builder, FLOAT(-DELTA), 4))
        rows = gather(grid, codes, 8).to_float(signed=True)
        out.store(32 * part, (rows + shift.spread(0, 32)) * scale.spread(0, 32))


def write_iq1_m(data: Array, grid: Array, out: Array) -> None:
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
        packed = data.load(32 + 2 * part, 2)
        high = (packed & 15).weave(packed >> 4)
        codes = data.load(4 * part, 4).widen(WORD) | ((high & 7).widen(WORD) << 8)
        shift = (high & 8).same(0).choose(DELTA, splat(builder, FLOAT(-DELTA), 4))
        rows = gather(grid, codes, 8).to_float(signed=True)
        shifts = shift.take([place // 8 for place in range(32)])
        scales = scale.spread(0, 16).join(scale.spread(1, 16))
        out.store(32 * part, (rows + shifts) * scales)


unpack_iq2_xxs = make_grid_unpack(write_iq2_xxs)
unpack_iq2_xs = make_grid_unpack(write_iq2_xs)
unpack_iq2_s = make_grid_unpack(write_iq2_s)
unpack_iq3_xxs = make_grid_unpack(write_iq3_xxs)
unpack_iq3_s = make_grid_unpack(write_iq3_s)
unpack_iq1_s = make_grid_unpack(write_iq1_s)
unpack_iq1_m = make_grid_unpack(write_iq1_m)


@compile_kernel
def decode_iq2_xxs(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ2_XXS: ``data`` uint8, ``grid`` int8 and ``out`` bits of floats, all flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq2_xxs(data, block * 66, grid, out, block * 256)


@compile_kernel
def decode_iq2_xs(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ2_XS: ``data`` uint8, ``grid`` int8 and ``out`` bits of floats, all flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq2_xs(data, block * 74, grid, out, block * 256)


@compile_kernel
def decode_iq2_s(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ2_S: ``data`` uint8, ``grid`` int8 and ``out`` bits of floats, all flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq2_s(data, block * 82, grid, out, block * 256)


@compile_kernel
def decode_iq3_xxs(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ3_XXS: ``data`` uint8, ``grid`` int8 and ``out`` bits of floats, all flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq3_xxs(data, block * 98, grid, out, block * 256)


@compile_kernel
def decode_iq3_s(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ3_S: ``data`` uint8, ``grid`` int8 and ``out`` bits of floats, all flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq3_s(data, block * 110, grid, out, block * 256)


@compile_kernel
def decode_iq1_s(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ1_S: ``data`` uint8, ``grid`` int8 and ``out`` bits of floats, all flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq1_s(data, block * 50, grid, out, block * 256)


@compile_kernel
def decode_iq1_m(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ1_M: ``data`` uint8, ``grid`` int8 and ``out`` bits of floats, all flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq1_m(data, block * 56, grid, out, block * 256)


def bind(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel that knows its grid and is called like those of all other formats."""

    def decode(data: Any, out: Any, num_chunks: int) -> None:
        kernel(data, read_grid(name).reshape(-1), out, num_chunks)

    return decode


#: The kernels under the names of their formats.
KERNELS: dict[str, Callable[..., None]] = {
    name: bind(name, kernel)
    for name, kernel in (
        ("iq2_xxs", decode_iq2_xxs),
        ("iq2_xs", decode_iq2_xs),
        ("iq2_s", decode_iq2_s),
        ("iq3_xxs", decode_iq3_xxs),
        ("iq3_s", decode_iq3_s),
        ("iq1_s", decode_iq1_s),
        ("iq1_m", decode_iq1_m),
    )
}
