"""GGUF's non-linear 4-bit formats on the CPU, decoded by numba: 16 levels times a scale.

Every ``write_...`` writes the code for one block; see ``ggml_unpack`` for what all of them share.

Source: ggml's ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (``dequantize_row_...``).
"""

from __future__ import annotations

from typing import Any

from numba import prange

from ingle.kernels.ggml.block import share
from ingle.kernels.ggml.grids import FLOATS, LEVELS
from ingle.kernels.ggml.unpack import make_unpack, nibbles
from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.vector import BYTE, DWORD, WORD, Array, Vector, splat


def pick(index: Vector, levels: tuple[int, ...] = LEVELS) -> Vector:
    """The levels that four bits name: a tree of choices, which every processor has."""
    rows = [index.of(level & 255) for level in levels]
    for bit in range(4):
        chosen = (index & (1 << bit)).same(0)
        rows = [chosen.choose(low, high) for low, high in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


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


def write_mxfp4(data: Array, out: Array) -> None:
    """``2^(e - 128) * level[q]``: twice the value times half the power of two, which may be a tiny float."""
    exponent = splat(data.builder, data.scalar(0, BYTE), 32).widen(DWORD)
    tiny = exponent.of(0x00200000) << exponent
    scale = (exponent < 2).choose(tiny, (exponent - 1) << 23).from_bits()
    out.store(0, pick(nibbles(data.load(1, 16)), FLOATS).to_float(signed=True) * scale)


def write_nvfp4(data: Array, out: Array) -> None:
    """``scale * level[q]``, in sub-blocks of 16 whose scales are floats of four bits of exponent and three more."""
    packed = data.load(0, 4).widen(DWORD)
    exponent, mantissa = (packed >> 3) & 15, packed & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).from_bits()
    scale = exponent.same(0).choose(mantissa.to_float() * 2.0**-10, normal)
    scale = packed.same(0x7F).choose(0.0, scale)
    for part in range(4):
        values = pick(nibbles(data.load(4 + 8 * part, 8)), FLOATS).to_float(signed=True)
        out.store(16 * part, values * scale.spread(part, 16))


unpack_iq4_nl = make_unpack(write_iq4_nl)
unpack_iq4_xs = make_unpack(write_iq4_xs)
unpack_mxfp4 = make_unpack(write_mxfp4)
unpack_nvfp4 = make_unpack(write_nvfp4)


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
def decode_mxfp4(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes MXFP4: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 32, num_chunks)
        for block in range(first, stop):
            unpack_mxfp4(data, block * 17, out, block * 32)


@compile_kernel
def decode_nvfp4(data: Any, out: Any, num_chunks: int) -> None:
    """Decodes NVFP4: ``data`` uint8 and ``out`` bits of floats, both flat; ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, out.size // 64, num_chunks)
        for block in range(first, stop):
            unpack_nvfp4(data, block * 36, out, block * 64)
