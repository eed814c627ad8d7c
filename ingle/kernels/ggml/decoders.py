"""Decoders of GGUF's block formats on the CPU: one numba kernel for each format.

A block never crosses a row and rows are contiguous, so a weight is one sequence of blocks. Each ``emit_...`` emits the
code that decodes one block in vector registers, with products in the order of ggml and the ``gguf`` package, rounded
once if ``out`` is bfloat16. The torch references in ``ingle.quant`` describe the layouts.

Source: ggml's ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (``dequantize_row_...``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import prange

from ingle.kernels.ggml.grid_decoders import GRID_FORMATS
from ingle.kernels.ggml.grids import FLOATS, LEVELS, read_grid
from ingle.kernels.numba.cache import Kernel, compile_kernel
from ingle.kernels.numba.scalars import chunk_bounds
from ingle.kernels.numba.vector import ARRAY, BYTE, DWORD, OFFSET, WORD, Array, Vector, make_intrinsic, splat


def nibbles(raw: Vector) -> Vector:
    """Returns the low halves of all bytes, then the high ones."""
    return (raw & 15).join(raw >> 4)


def emit_legacy(data: Array, out: Array, *, low: int, high: int | None = None, middle: int | None = None) -> None:
    """``d * (q - middle)``, or ``d * q + m`` without a middle.

    Bytes from ``low`` on contain four bits of each code, and those from ``high`` on the fifth bit.
    """
    codes = nibbles(data.load(low, 16))
    if high is not None:
        codes = codes | data.flags(high, 32).choose(16, codes.of(0))
    if middle is None:
        out.store(0, codes.to_float() * data.half(0) + data.half(2))
    else:
        out.store(0, (codes - middle).to_float(signed=True) * data.half(0))


def emit_q8_0(data: Array, out: Array) -> None:
    """``d * q``."""
    out.store(0, data.load(2, 32).to_float(signed=True) * data.half(0))


def emit_q4_k_or_q5_k(data: Array, out: Array, *, low: int, high: int | None = None) -> None:
    """``(d * scale) * q - dmin * min``, in sub-blocks of 32; Q5_K has a fifth bit from byte ``high`` on."""
    scales, mins, mixed = (data.load(first, 4) for first in (4, 8, 12))
    scale = (scales & 63).join((mixed & 15) | ((scales >> 2) & 0x30)).to_float() * data.half(0)
    minimum = (mins & 63).join((mixed >> 4) | ((mins >> 2) & 0x30)).to_float() * data.half(2)
    fifth = None if high is None else data.load(high, 32)
    for pair in range(4):
        raw = data.load(low + 32 * pair, 32)
        for half, codes in enumerate((raw & 15, raw >> 4)):
            part = 2 * pair + half
            if fifth is not None:
                codes = codes | (((fifth >> part) & 1) << 4)
            out.store(32 * part, codes.to_float() * scale.spread(part, 32) - minimum.spread(part, 32))


def store_sixteens(out: Array, part: int, codes: Vector, scale: Vector, minimum: Vector | None = None) -> None:
    """Stores 32 weights, which are two sub-blocks of 16; the first has number ``2 * part``."""
    for half in range(2):
        number = 2 * part + half
        values = codes[16 * half : 16 * half + 16] * scale.spread(number, 16)
        out.store(16 * number, values if minimum is None else values - minimum.spread(number, 16))


def emit_q6_k(data: Array, out: Array) -> None:
    """``(d * scale) * (q - 32)``, in sub-blocks of 16."""
    scale = data.load(192, 16).to_float(signed=True) * data.half(208)
    for half in range(2):
        high = data.load(128 + 32 * half, 32)
        for quarter in range(4):
            low = data.load(64 * half + 32 * (quarter % 2), 32)
            low = low & 15 if quarter < 2 else low >> 4
            codes = (low | (((high >> (2 * quarter)) & 3) << 4)) - 32
            store_sixteens(out, 4 * half + quarter, codes.to_float(signed=True), scale)


def emit_q3_k(data: Array, out: Array) -> None:
    """``(d * (scale - 32)) * (q - 4)``, in sub-blocks of 16; the third bits of the codes are stored separately."""
    low, high = data.load(96, 8), data.load(104, 4)
    tops = (high & 3).join((high >> 2) & 3).join(((high >> 4) & 3).join((high >> 6) & 3))
    scale = ((nibbles(low) | (tops << 4)) - 32).to_float(signed=True) * data.half(108)
    third = data.load(0, 32)
    for half in range(2):
        raw = data.load(32 + 32 * half, 32)
        for quarter in range(4):
            part = 4 * half + quarter
            codes = (((raw >> (2 * quarter)) & 3) | (((third >> part) & 1) << 2)) - 4
            store_sixteens(out, part, codes.to_float(signed=True), scale)


def emit_q2_k(data: Array, out: Array) -> None:
    """``(d * scale) * q - dmin * min``, in sub-blocks of 16."""
    fields = data.load(0, 16)
    scale, minimum = (fields & 15).to_float() * data.half(80), (fields >> 4).to_float() * data.half(82)
    for half in range(2):
        raw = data.load(16 + 32 * half, 32)
        for quarter in range(4):
            codes = (raw >> (2 * quarter)) & 3
            store_sixteens(out, 4 * half + quarter, codes.to_float(), scale, minimum)


def pick(index: Vector, levels: tuple[int, ...] = LEVELS) -> Vector:
    """Returns the levels of 4-bit codes, by a tree of selections, which every processor supports."""
    rows = [index.of(level & 255) for level in levels]
    for bit in range(4):
        is_zero = (index & (1 << bit)).same(0)
        rows = [is_zero.choose(low, high) for low, high in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def emit_iq4_nl(data: Array, out: Array) -> None:
    """``d * level[q]``."""
    out.store(0, pick(nibbles(data.load(2, 16))).to_float(signed=True) * data.half(0))


def emit_iq4_xs(data: Array, out: Array) -> None:
    """``(d * (scale - 32)) * level[q]``, in sub-blocks of 32."""
    low = data.load(4, 4)
    tops = splat(data.builder, data.scalar(2, WORD), 8) >> [2 * part for part in range(8)]
    codes = ((low & 15).weave(low >> 4) | ((tops & 3).narrow(BYTE) << 4)) - 32
    scale = codes.to_float(signed=True) * data.half(0)
    for part in range(8):
        values = pick(nibbles(data.load(8 + 16 * part, 16))).to_float(signed=True)
        out.store(32 * part, values * scale.spread(part, 32))


def emit_mxfp4(data: Array, out: Array) -> None:
    """``2^(e - 128) * level[q]``: levels are twice the values; the power of two may be subnormal."""
    exponent = splat(data.builder, data.scalar(0, BYTE), 32).widen(DWORD)
    subnormal = exponent.of(0x00200000) << exponent
    scale = (exponent < 2).choose(subnormal, (exponent - 1) << 23).from_bits()
    out.store(0, pick(nibbles(data.load(1, 16)), FLOATS).to_float(signed=True) * scale)


def emit_nvfp4(data: Array, out: Array) -> None:
    """``scale * level[q]``, in sub-blocks of 16; a scale has four bits of exponent and three of mantissa."""
    raw = data.load(0, 4).widen(DWORD)
    exponent, mantissa = (raw >> 3) & 15, raw & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).from_bits()
    scale = exponent.same(0).choose(mantissa.to_float() * 2.0**-10, normal)
    scale = raw.same(0x7F).choose(0.0, scale)
    for part in range(4):
        values = pick(nibbles(data.load(4 + 8 * part, 8)), FLOATS).to_float(signed=True)
        out.store(16 * part, values * scale.spread(part, 16))


def emit_tq1_0(data: Array, out: Array) -> None:
    """``d * (trit - 1)``: 160 + 80 weights with five per byte, the last 16 with four per byte.

    A byte is a fraction of 256 whose base-3 digits are trits; multiplying by a power of 3 moves one of them to the
    front.
    """
    scale = data.half(52)
    for first, width, to, count in ((0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4)):
        raw = data.load(first, width)
        for number in range(count):
            product = (raw.widen(WORD) * 3**number) & 255
            trits = ((product * 3) >> 8).narrow(BYTE) - 1
            out.store(to + width * number, trits.to_float(signed=True) * scale)


def emit_tq2_0(data: Array, out: Array) -> None:
    """``d * (q - 1)``."""
    scale = data.half(64)
    for half in range(2):
        raw = data.load(32 * half, 32)
        for quarter in range(4):
            codes = ((raw >> (2 * quarter)) & 3) - 1
            out.store(128 * half + 32 * quarter, codes.to_float(signed=True) * scale)


#: By ``base.format``: the function that decodes a block, and the number of bytes and weights in a block.
PLAIN_FORMATS: dict[str, tuple[Callable[..., None], int, int]] = {
    "q4_0": (partial(emit_legacy, low=2, middle=8), 18, 32),
    "q4_1": (partial(emit_legacy, low=4), 20, 32),
    "q5_0": (partial(emit_legacy, low=6, high=2, middle=16), 22, 32),
    "q5_1": (partial(emit_legacy, low=8, high=4), 24, 32),
    "q8_0": (emit_q8_0, 34, 32),
    "q2_k": (emit_q2_k, 84, 256),
    "q3_k": (emit_q3_k, 110, 256),
    "q4_k": (partial(emit_q4_k_or_q5_k, low=16), 144, 256),
    "q5_k": (partial(emit_q4_k_or_q5_k, low=48, high=16), 176, 256),
    "q6_k": (emit_q6_k, 210, 256),
    "iq4_nl": (emit_iq4_nl, 18, 32),
    "iq4_xs": (emit_iq4_xs, 136, 256),
    "tq1_0": (emit_tq1_0, 54, 256),
    "tq2_0": (emit_tq2_0, 66, 256),
    "mxfp4": (emit_mxfp4, 17, 32),
    "nvfp4": (emit_nvfp4, 36, 64),
}


def make_decoder(name: str, emit: Callable[[Array, Array, Array], None], block_bytes: int, block_size: int) -> Kernel:
    """Returns the kernel of one format: ``data`` uint8, ``grid`` int8 and ``out`` the bits of floats, all flat."""
    decode_block = make_intrinsic(emit, (ARRAY, OFFSET, ARRAY, ARRAY, OFFSET))

    def decode(data: Any, grid: Any, out: Any, num_chunks: int) -> None:
        for chunk in prange(num_chunks):
            first, stop = chunk_bounds(chunk, out.size // block_size, num_chunks)
            for block in range(first, stop):
                decode_block(data, block * block_bytes, grid, out, block * block_size)

    return compile_kernel(decode, name=f"decode_{name}")


def _without_grid(emit: Callable[[Array, Array], None]) -> Callable[[Array, Array, Array], None]:
    return lambda data, grid, out: emit(data, out)


#: The kernels by ``base.format``.
KERNELS = {
    **{name: make_decoder(name, _without_grid(emit), *sizes) for name, (emit, *sizes) in PLAIN_FORMATS.items()},
    **{name: make_decoder(name, emit, *sizes) for name, (emit, *sizes) in GRID_FORMATS.items()},
}


def decode(name: str, data: Any, out: Any, num_chunks: int) -> None:
    """Decodes the blocks of the format ``name``.

    Args:
        name: As in ``base.format``.
        data: uint8, flat.
        out: The bits of bfloat16 (uint16) or float32 (uint32), flat, written.
        num_chunks: Number of parts that the work is divided into for threads.
    """
    grid = read_grid(name).reshape(-1) if name in GRID_FORMATS else np.empty(0, np.int8)
    KERNELS[name](data, grid, out, num_chunks)
