"""Codes of few bits with a float16 scale and zero for every group, decoded by numba.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = groups in a row.

A weight is ``(code - zero) * scale`` in float32, rounded once.  A row is one little-endian number: code ``k`` lies in
its bits from ``k * bits`` on, so eight codes are as many bytes as a code has bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from ingle.kernels.ggml.block import from_half
from ingle.kernels.levels.decode import split
from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.lookup import put
from ingle.kernels.numba.vector import DWORD, Array, Vector, splat

#: Weights decoded in one go where a group has as many.
WIDE = 32
#: Codes that are whole bytes whatever their bits.
UNIT = 8


def read_8(data: Array, count: int) -> Vector:
    """Codes of eight bits."""
    return data.load(0, count)


def read_4(data: Array, count: int) -> Vector:
    """Codes of four bits."""
    packed = data.load(0, count // 2)
    return (packed & 15).weave(packed >> 4)


def read_3(data: Array, count: int) -> Vector:
    """Codes of three bits: eight of them lie in three bytes, which every one of them looks at."""
    num_bytes = 3 * count // 8
    order = [3 * (k // 8) + byte if byte < 3 else num_bytes for k in range(count) for byte in range(4)]
    spread = data.load(0, num_bytes).take(order)
    words = Vector(data.builder, data.builder.bitcast(spread.value, ir.VectorType(DWORD, count)))
    return (words >> [3 * (k % 8) for k in range(count)]) & 7


def read_2(data: Array, count: int) -> Vector:
    """Codes of two bits."""
    packed = data.load(0, count // 4)
    pairs = (packed & 15).weave(packed >> 4)
    return (pairs & 3).weave(pairs >> 2)


def make_unpack(read: Callable[[Array, int], Vector], count: int) -> Any:
    """A function for kernels, ``unpack(data, at, scale, zero, out, to)``, that decodes ``count`` weights."""

    @intrinsic  # type: ignore[untyped-decorator]
    def unpack(_: Any, data: Any, at: Any, scale: Any, zero: Any, out: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            codes = read(Array(context, builder, kinds[0], arguments[0], arguments[1]), count)
            weights = (codes.to_float() - splat(builder, arguments[3], count)) * splat(builder, arguments[2], count)
            Array(context, builder, kinds[4], arguments[4], arguments[5]).store(0, weights)
            return context.get_dummy_value()

        return types.void(data, at, types.float32, types.float32, out, to), generate

    return unpack


def make_choose(count: int) -> Any:
    """The same for codes of one bit, which choose between two weights."""

    @intrinsic  # type: ignore[untyped-decorator]
    def choose(_: Any, data: Any, at: Any, scale: Any, zero: Any, out: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            bits = Array(context, builder, kinds[0], arguments[0], arguments[1]).flags(0, count)
            scale, zero = splat(builder, arguments[2], count), splat(builder, arguments[3], count)
            weights = bits.choose((zero.of(1.0) - zero) * scale, (zero.of(0.0) - zero) * scale)
            Array(context, builder, kinds[4], arguments[4], arguments[5]).store(0, weights)
            return context.get_dummy_value()

        return types.void(data, at, types.float32, types.float32, out, to), generate

    return choose


wide_1, unit_1 = make_choose(WIDE), make_choose(UNIT)
wide_2, unit_2 = make_unpack(read_2, WIDE), make_unpack(read_2, UNIT)
wide_3, unit_3 = make_unpack(read_3, WIDE), make_unpack(read_3, UNIT)
wide_4, unit_4 = make_unpack(read_4, WIDE), make_unpack(read_4, UNIT)
wide_8, unit_8 = make_unpack(read_8, WIDE), make_unpack(read_8, UNIT)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def decode_rest(data: Any, at: int, bits: int, length: int, scale: Any, zero: Any, out: Any, to: int) -> None:
    """Decodes fewer weights than a unit, one by one."""
    for k in range(length):
        place = at + (k * bits >> 3)
        word = np.uint32(data[place])
        if (k * bits & 7) + bits > 8:
            word |= np.uint32(data[place + 1]) << np.uint32(8)
        code = (word >> np.uint32(k * bits & 7)) & np.uint32((1 << bits) - 1)
        put((np.float32(code) - zero) * scale, out, to + k)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def decode_group(data: Any, at: int, bits: int, length: int, scale: Any, zero: Any, out: Any, to: int) -> None:
    """Decodes one group: wide units, then units, then what is left."""
    done = 0
    while length - done >= UNIT:
        wide = length - done >= WIDE
        place, target = at + (done * bits >> 3), to + done
        if bits == 4:
            if wide:
                wide_4(data, place, scale, zero, out, target)
            else:
                unit_4(data, place, scale, zero, out, target)
        elif bits == 3:
            if wide:
                wide_3(data, place, scale, zero, out, target)
            else:
                unit_3(data, place, scale, zero, out, target)
        elif bits == 2:
            if wide:
                wide_2(data, place, scale, zero, out, target)
            else:
                unit_2(data, place, scale, zero, out, target)
        elif bits == 1:
            if wide:
                wide_1(data, place, scale, zero, out, target)
            else:
                unit_1(data, place, scale, zero, out, target)
        elif wide:
            wide_8(data, place, scale, zero, out, target)
        else:
            unit_8(data, place, scale, zero, out, target)
        done += WIDE if wide else UNIT
    if done < length:
        decode_rest(data, at + (done * bits >> 3), bits, length - done, scale, zero, out, to + done)


@compile_kernel
def decode_groups(codes: Any, scales: Any, zeros: Any, bits: int, size: int, out: Any, num_chunks: int) -> None:
    """Decodes groups.

    Args:
        codes: uint8 ``[O, C]``.
        scales: uint16 ``[O, N]``: bits of float16.
        zeros: uint16 ``[O, N]``.
        bits: Of a code.
        size: Weights of a group, a multiple of 8; the last of a row may be short.
        out: ``[O, I]``, the bits of bfloat16 (uint16) or float32 (uint32).
        num_chunks: Parts the rows are split into.
    """
    num_rows, num_columns = out.shape
    flat_codes, flat_out = codes.reshape(-1), out.reshape(-1)
    for chunk in prange(num_chunks):
        first, stop = split(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            for group in range(scales.shape[1]):
                scale, zero = from_half(scales[row, group]), from_half(zeros[row, group])
                column = group * size
                at, to = row * codes.shape[1] + column * bits // 8, row * num_columns + column
                decode_group(flat_codes, at, bits, min(size, num_columns - column), scale, zero, flat_out, to)
