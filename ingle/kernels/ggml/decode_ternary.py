"""GGUF's ternary formats on the CPU, decoded by numba: blocks of 256 with one scale.

Every ``write_...`` writes the code for one block; see ``ggml_unpack`` for what all of them share.

Source: ggml's ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (``dequantize_row_...``).
"""

from __future__ import annotations

from typing import Any

from numba import prange

from ingle.kernels.ggml.block import share
from ingle.kernels.ggml.unpack import make_unpack
from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.vector import BYTE, WORD, Array, Vector

#: Factors that bring a trit of a byte to the front.
POWERS = (1, 3, 9, 27, 81)


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


unpack_tq1_0 = make_unpack(write_tq1_0)
unpack_tq2_0 = make_unpack(write_tq2_0)


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
