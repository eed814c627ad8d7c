"""GGUF's first formats on the CPU, decoded by numba: blocks of 32 with a scale and, in some, an offset.

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


def fifth(data: Array, first: int, codes: Vector) -> Vector:
    """Codes of four bits and one more, from 32 bits."""
    return codes | data.flags(first, 32).choose(16, codes.of(0))


def write_q4_0(data: Array, out: Array) -> None:
    """``d * (q - 8)``."""
    out.store(0, (nibbles(data.load(2, 16)) - 8).to_float(signed=True) * data.half(0))


def write_q4_1(data: Array, out: Array) -> None:
    """``d * q + m``."""
    out.store(0, nibbles(data.load(4, 16)).to_float() * data.half(0) + data.half(2))


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


unpack_q4_0 = make_unpack(write_q4_0)
unpack_q4_1 = make_unpack(write_q4_1)
unpack_q5_0 = make_unpack(write_q5_0)
unpack_q5_1 = make_unpack(write_q5_1)
unpack_q8_0 = make_unpack(write_q8_0)


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
