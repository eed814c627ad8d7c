"""GGUF's block formats on the CPU, decoded by numba: whole blocks in vector registers.

A block never crosses a row and rows lie one after the other, so a weight is one sequence of blocks.  Every
``write_...`` writes the code for one block, in the order of products that ggml and the ``gguf`` package have, rounded
once where ``out`` holds bfloat16; the layouts are described in ``ingle.quant``, whose plain torch is the reference.

Source: ggml's ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (``dequantize_row_...``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from ingle.kernels.cpu_cache import compile_kernel
from ingle.kernels.vector import BYTE, WORD, Array, Vector, splat

#: The 16 levels of the non-linear 4-bit formats.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
#: Factors that bring a trit of a byte to the front.
POWERS = (1, 3, 9, 27, 81)


def make_unpack(write: Callable[[Array, Array], None]) -> Any:
    """A function for kernels, ``unpack(data, at, out, to)``, from one that writes the code for a block."""

    @intrinsic  # type: ignore[untyped-decorator]
    def unpack(_: Any, data: Any, at: Any, out: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            source = Array(context, builder, kinds[0], arguments[0], arguments[1])
            write(source, Array(context, builder, kinds[2], arguments[2], arguments[3]))
            return context.get_dummy_value()

        return types.void(data, at, out, to), generate

    return unpack


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def share(chunk: Any, num_blocks: Any, num_chunks: Any) -> Any:
    """First block of a chunk and of the next."""
    signed = np.int64(chunk)  # numba counts chunks unsigned, which times a signed number is a float
    return signed * num_blocks // num_chunks, (signed + 1) * num_blocks // num_chunks


def nibbles(packed: Vector) -> Vector:
    """The low halves of all bytes, then the high ones."""
    return (packed & 15).join(packed >> 4)


def pick(index: Vector) -> Vector:
    """The non-linear levels that four bits name: a tree of choices, which every processor has."""
    rows = [index.of(level & 255) for level in LEVELS]
    for bit in range(4):
        chosen = (index & (1 << bit)).same(0)
        rows = [chosen.choose(low, high) for low, high in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def write_q4_0(data: Array, out: Array) -> None:
    """``d * (q - 8)``."""
    out.store(0, (nibbles(data.load(2, 16)) - 8).to_float(signed=True) * data.half(0))


def write_q4_1(data: Array, out: Array) -> None:
    """``d * q + m``."""
    out.store(0, nibbles(data.load(4, 16)).to_float() * data.half(0) + data.half(2))


def fifth(data: Array, first: int, codes: Vector) -> Vector:
    """Codes of four bits and one more, from 32 bits."""
    return codes | data.flags(first, 32).choose(16, codes.of(0))


def write_q5_0(data: Array, out: Array) -> None:
    """``d * (q - 16)``."""
    codes = fifth(data, 2, nibbles(data.load(6, 16)))
    out.store(0, (codes - 16).to_float(signed=True) * data.half(0))


def write_q5_1(data: Array, out: Array) -> None:
    """``d * q + m``."""
    codes = fifth(data, 4, nibbles(data.load(8, 16)))
    out.store(0, codes.to_float() * data.half(0) + data.half(2))


def write_q8_0(data: Array, out: Array) -> None:
    """``d * q``."""
    out.store(0, data.load(2, 32).to_float(signed=True) * data.half(0))


def scales_and_mins(data: Array) -> tuple[Vector, Vector]:
    """The eight float32 scales and offsets of a Q4_K or Q5_K block."""
    low, high, mixed = (data.load(first, 4) for first in (4, 8, 12))
    scale = (low & 63).join((mixed & 15) | ((low >> 2) & 0x30))
    minimum = (high & 63).join((mixed >> 4) | ((high >> 2) & 0x30))
    return scale.to_float() * data.half(0), minimum.to_float() * data.half(2)


def write_q4_k(data: Array, out: Array) -> None:
    """``(d * scale) * q - dmin * min``, in sub-blocks of 32."""
    scale, minimum = scales_and_mins(data)
    for pair in range(4):
        packed = data.load(16 + 32 * pair, 32)
        for half, codes in enumerate((packed & 15, packed >> 4)):
            part = 2 * pair + half
            out.store(32 * part, codes.to_float() * scale.spread(part, 32) - minimum.spread(part, 32))


def write_q5_k(data: Array, out: Array) -> None:
    """As Q4_K, with a fifth bit."""
    scale, minimum = scales_and_mins(data)
    high = data.load(16, 32)
    for pair in range(4):
        packed = data.load(48 + 32 * pair, 32)
        for half, codes in enumerate((packed & 15, packed >> 4)):
            part = 2 * pair + half
            codes = codes | (((high >> part) & 1) << 4)
            out.store(32 * part, codes.to_float() * scale.spread(part, 32) - minimum.spread(part, 32))


def store_sixteens(out: Array, part: int, codes: Vector, scale: Vector, minimum: Vector | None = None) -> None:
    """32 codes in two sub-blocks of 16, the first of them number ``2 * part``."""
    for half in range(2):
        number = 2 * part + half
        values = codes[16 * half : 16 * half + 16] * scale.spread(number, 16)
        out.store(16 * number, values if minimum is None else values - minimum.spread(number, 16))


def write_q6_k(data: Array, out: Array) -> None:
    """``(d * scale) * (q - 32)``, in sub-blocks of 16."""
    scale = data.load(192, 16).to_float(signed=True) * data.half(208)
    for half in range(2):
        high = data.load(128 + 32 * half, 32)
        for quarter in range(4):
            low = data.load(64 * half + 32 * (quarter % 2), 32)
            low = low & 15 if quarter < 2 else low >> 4
            codes = (low | (((high >> (2 * quarter)) & 3) << 4)) - 32
            store_sixteens(out, 4 * half + quarter, codes.to_float(signed=True), scale)


def write_q2_k(data: Array, out: Array) -> None:
    """``(d * scale) * q - dmin * min``, in sub-blocks of 16."""
    fields = data.load(0, 16)
    scale, minimum = (fields & 15).to_float() * data.half(80), (fields >> 4).to_float() * data.half(82)
    for half in range(2):
        packed = data.load(16 + 32 * half, 32)
        for quarter in range(4):
            codes = (packed >> (2 * quarter)) & 3
            store_sixteens(out, 4 * half + quarter, codes.to_float(), scale, minimum)


def write_q3_k(data: Array, out: Array) -> None:
    """``(d * (scale - 32)) * (q - 4)``, in sub-blocks of 16; the third bit of every code lies apart."""
    low, high = data.load(96, 8), data.load(104, 4)
    tops = (high & 3).join((high >> 2) & 3).join(((high >> 4) & 3).join((high >> 6) & 3))
    scale = ((nibbles(low) | (tops << 4)) - 32).to_float(signed=True) * data.half(108)
    third = data.load(0, 32)
    for half in range(2):
        packed = data.load(32 + 32 * half, 32)
        for quarter in range(4):
            part = 4 * half + quarter
            codes = (((packed >> (2 * quarter)) & 3) | (((third >> part) & 1) << 2)) - 4
            store_sixteens(out, part, codes.to_float(signed=True), scale)


def write_iq4_nl(data: Array, out: Array) -> None:
    """``d * level[q]``."""
    out.store(0, pick(nibbles(data.load(2, 16))).to_float(signed=True) * data.half(0))


def write_iq4_xs(data: Array, out: Array) -> None:
    """``(d * (scale - 32)) * level[q]``, in sub-blocks of 32."""
    low = data.load(4, 4)
    tops = splat(data.builder, data.scalar(2, WORD), 8) >> [2 * part for part in range(8)]
    codes = ((low & 15).weave(low >> 4) | ((tops & 3).narrow(BYTE) << 4)) - 32
    scale = codes.to_float(signed=True) * data.half(0)
    for part in range(8):
        values = pick(nibbles(data.load(8 + 16 * part, 16))).to_float(signed=True)
        out.store(32 * part, values * scale.spread(part, 32))


def trits(packed: Vector, number: int) -> Vector:
    """The trit of that number of every byte, less one; bytes hold five as fractions of 256 with base 3."""
    product = (packed.widen(WORD) * POWERS[number]) & 255
    return ((product * 3) >> 8).narrow(BYTE) - 1


def write_tq1_0(data: Array, out: Array) -> None:
    """``d * (trit - 1)``: 160 weights five to a byte, 80 likewise, the last 16 four to a byte."""
    scale = data.half(52)
    for first, width, to, count in ((0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4)):
        packed = data.load(first, width)
        for number in range(count):
            out.store(to + width * number, trits(packed, number).to_float(signed=True) * scale)


def write_tq2_0(data: Array, out: Array) -> None:
    """``d * (q - 1)``."""
    scale = data.half(64)
    for half in range(2):
        packed = data.load(32 * half, 32)
        for quarter in range(4):
            codes = ((packed >> (2 * quarter)) & 3) - 1
            out.store(128 * half + 32 * quarter, codes.to_float(signed=True) * scale)


unpack_q4_0 = make_unpack(write_q4_0)
unpack_q4_1 = make_unpack(write_q4_1)
unpack_q5_0 = make_unpack(write_q5_0)
unpack_q5_1 = make_unpack(write_q5_1)
unpack_q8_0 = make_unpack(write_q8_0)
unpack_q4_k = make_unpack(write_q4_k)
unpack_q6_k = make_unpack(write_q6_k)
unpack_q5_k = make_unpack(write_q5_k)
unpack_q3_k = make_unpack(write_q3_k)
unpack_q2_k = make_unpack(write_q2_k)
unpack_iq4_nl = make_unpack(write_iq4_nl)
unpack_iq4_xs = make_unpack(write_iq4_xs)
unpack_tq1_0 = make_unpack(write_tq1_0)
unpack_tq2_0 = make_unpack(write_tq2_0)


@compile_kernel
def decode_q4_0(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q4_0: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 32, num_chunks)
        for block in range(first, stop):
            unpack_q4_0(data, block * 18, out, block * 32)


@compile_kernel
def decode_q4_1(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q4_1: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 32, num_chunks)
        for block in range(first, stop):
            unpack_q4_1(data, block * 20, out, block * 32)


@compile_kernel
def decode_q5_0(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q5_0: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 32, num_chunks)
        for block in range(first, stop):
            unpack_q5_0(data, block * 22, out, block * 32)


@compile_kernel
def decode_q5_1(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q5_1: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 32, num_chunks)
        for block in range(first, stop):
            unpack_q5_1(data, block * 24, out, block * 32)


@compile_kernel
def decode_q8_0(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q8_0: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 32, num_chunks)
        for block in range(first, stop):
            unpack_q8_0(data, block * 34, out, block * 32)


@compile_kernel
def decode_q4_k(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q4_K: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_q4_k(data, block * 144, out, block * 256)


@compile_kernel
def decode_q6_k(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q6_K: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_q6_k(data, block * 210, out, block * 256)


@compile_kernel
def decode_q5_k(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q5_K: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_q5_k(data, block * 176, out, block * 256)


@compile_kernel
def decode_q3_k(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q3_K: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_q3_k(data, block * 110, out, block * 256)


@compile_kernel
def decode_q2_k(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes Q2_K: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_q2_k(data, block * 84, out, block * 256)


@compile_kernel
def decode_iq4_nl(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ4_NL: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 32, num_chunks)
        for block in range(first, stop):
            unpack_iq4_nl(data, block * 18, out, block * 32)


@compile_kernel
def decode_iq4_xs(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes IQ4_XS: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_iq4_xs(data, block * 136, out, block * 256)


@compile_kernel
def decode_tq1_0(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes TQ1_0: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_tq1_0(data, block * 54, out, block * 256)


@compile_kernel
def decode_tq2_0(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes TQ2_0: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 256, num_chunks)
        for block in range(first, stop):
            unpack_tq2_0(data, block * 66, out, block * 256)


#: The kernels under the names of their formats.
KERNELS: dict[str, Callable[..., None]] = {
    "q4_0": decode_q4_0,
    "q4_1": decode_q4_1,
    "q5_0": decode_q5_0,
    "q5_1": decode_q5_1,
    "q8_0": decode_q8_0,
    "q4_k": decode_q4_k,
    "q6_k": decode_q6_k,
    "q5_k": decode_q5_k,
    "q3_k": decode_q3_k,
    "q2_k": decode_q2_k,
    "iq4_nl": decode_iq4_nl,
    "iq4_xs": decode_iq4_xs,
    "tq1_0": decode_tq1_0,
    "tq2_0": decode_tq2_0,
}
