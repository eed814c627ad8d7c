"""GGUF's k-quants on the CPU, decoded by numba: blocks of 256 whose sub-blocks have scales of few bits.

Every ``write_...`` writes the code for one block; see ``ggml_unpack`` for what all of them share.

Source: ggml's ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (``dequantize_row_...``).
"""

from __future__ import annotations

from typing import Any

from numba import prange

from ingle.kernels.ggml.block import share
from ingle.kernels.ggml.unpack import make_unpack, nibbles
from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.vector import Array, Vector


def scales_and_mins(data: Array) -> tuple[Vector, Vector]:
    """The eight float32 scales and offsets of a Q4_K or Q5_K block."""
    low, high, mixed = (data.load(first, 4) for first in (4, 8, 12))
    scale = (low & 63).join((mixed & 15) | ((low >> 2) & 0x30))
    minimum = (high & 63).join((mixed >> 4) | ((high >> 2) & 0x30))
    return scale.to_float() * data.half(0), minimum.to_float() * data.half(2)


def store_sixteens(out: Array, part: int, codes: Vector, scale: Vector, minimum: Vector | None = None) -> None:
    """32 codes in two sub-blocks of 16, the first of them number ``2 * part``."""
    for half in range(2):
        number = 2 * part + half
        values = codes[16 * half : 16 * half + 16] * scale.spread(number, 16)
        out.store(16 * number, values if minimum is None else values - minimum.spread(number, 16))


def write_q4_k(data: Array, out: Array) -> None:
    """``(d * scale) * q - dmin * min``, in sub-blocks of 32."""
    scale, minimum = scales_and_mins(data)
    for pair in range(4):
        packed = data.load(16 + 32 * pair, 32)
        for half, codes in enumerate((packed & 15, packed >> 4)):
            part = 2 * pair + half
            out.store(32 * part, codes.to_float() * scale.spread(part, 32) - minimum.spread(part, 32))


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


def write_q2_k(data: Array, out: Array) -> None:
    """``(d * scale) * q - dmin * min``, in sub-blocks of 16."""
    fields = data.load(0, 16)
    scale, minimum = (fields & 15).to_float() * data.half(80), (fields >> 4).to_float() * data.half(82)
    for half in range(2):
        packed = data.load(16 + 32 * half, 32)
        for quarter in range(4):
            codes = (packed >> (2 * quarter)) & 3
            store_sixteens(out, 4 * half + quarter, codes.to_float(), scale, minimum)


unpack_q4_k = make_unpack(write_q4_k)
unpack_q6_k = make_unpack(write_q6_k)
unpack_q5_k = make_unpack(write_q5_k)
unpack_q3_k = make_unpack(write_q3_k)
unpack_q2_k = make_unpack(write_q2_k)


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
