"""Look-up of sixteen levels by 4-bit codes, inside vector registers.

The 16 products ``level * scale`` of a block are rounded once to the output type, and a shuffle picks from them by code:

- processors with AVX-512BW permute whole products, 32 bfloat16 or 16 float32 at a time (``vpermw``, ``vpermps``);
- others with a 16-byte shuffle (SSSE3's ``pshufb``, NEON's ``tbl``) shuffle the bytes of products, 16 at a time;
- the rest use ``look_up_portable``.

All give the same results. LLVM's own vectorizer generates none of these: it compiles a look-up into single loads, which
are ten times slower.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types

from ingle.kernels.numba.scalars import float_bits, inlined
from ingle.kernels.numba.vector import ARRAY, BYTE, DWORD, OFFSET, WORD, Array, Vector, make_intrinsic, splat

#: Weights decoded by one look-up.
UNIT = 16
#: Weights decoded at once if a block has as many: twice as fast, because there is no loop in between.
WIDE = 64


def find_shuffle() -> str | None:
    """LLVM's name of this processor's 16-byte shuffle, or None."""
    match platform.machine().lower():
        case "x86_64" | "amd64":
            return "llvm.x86.ssse3.pshuf.b.128" if _has("ssse3") else None
        case "aarch64" | "arm64":
            return "llvm.aarch64.neon.tbl1.v16i8" if not _is_overridden() or _has("neon") else None
    return None


def has_permute() -> bool:
    """Returns whether this processor can permute the 16-bit words of 64 bytes (AVX-512BW)."""
    return platform.machine().lower() in ("x86_64", "amd64") and _has("avx512bw")


def _is_overridden() -> bool:
    """Returns whether ``NUMBA_CPU_NAME`` or ``NUMBA_CPU_FEATURES`` names the processor that numba compiles for."""
    return numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None


def _has(feature: str) -> bool:
    """Returns whether the processor that numba compiles for has one of LLVM's features."""
    if _is_overridden():
        return f"+{feature}" in (numba.config.CPU_FEATURES or "").split(",")
    return bool(binding.get_host_cpu_features().get(feature))


def make_look_up(shuffle: str | None, count: int) -> Any:
    """``look_up_portable`` of ``count`` weights for numba's kernels, by a byte shuffle or by permutes.

    Args:
        shuffle: LLVM's name of a 16-byte shuffle; None for AVX-512BW's permutes.
        count: Weights decoded at once: a multiple of 16, and of 32 for the permutes.
    """
    kinds = (ARRAY, OFFSET, ARRAY, types.float32, ARRAY, OFFSET)
    return make_intrinsic(emit_look_up, kinds, shuffle=shuffle, count=count)


def emit_look_up(codes: Array, levels: Array, scale: Any, out: Array, *, shuffle: str | None, count: int) -> None:
    """Emits the look-up of ``count`` weights; the arguments are those of ``look_up_portable``."""
    table = levels.load(0, UNIT)
    # Nothing changes the levels, so the products of a block are computed once for all its units.
    table.value.set_metadata("invariant.load", table.builder.module.add_metadata([]))
    products = table * splat(table.builder, scale, UNIT)
    narrow = out.dtype == types.uint16
    size = 2 * UNIT if narrow and shuffle is None else UNIT
    for start in range(0, count, size):
        raw = codes.load(start // 2, size // 2)
        weights = permute(products, raw, narrow) if shuffle is None else pick(products, raw, shuffle, narrow)
        out.store(start, weights)


def permute(products: Vector, raw: Vector, narrow: bool) -> Vector:
    """Looks up 32 codes as bfloat16 if narrow, else 16 codes as float32.

    A byte is spread over two elements of the index, the high nibble of the even weight first. The second element is the
    full byte: the permute uses only its lowest bits, five of them for words, so their table contains everything twice.
    """
    spread = raw.widen(DWORD if narrow else ir.IntType(64))
    index = (spread >> 4) | (spread << (16 if narrow else 32))
    if not narrow:
        table = products.bits()
        return table.call("llvm.x86.avx512.permvar.si.512", index.view(DWORD))
    halves = products.to_bfloat16()
    return halves.join(halves).call("llvm.x86.avx512.permvar.hi.512", index.view(WORD))


def pick(products: Vector, raw: Vector, shuffle: str, narrow: bool) -> Vector:
    """Looks up 16 codes, as bytes in memory order: bfloat16 if narrow, else float32."""
    index = (raw >> 4).weave(raw & 15)
    values = products.to_bfloat16() if narrow else products.bits()
    picked = [(values >> 8 * number).narrow(BYTE).call(shuffle, index) for number in range(2 if narrow else 4)]
    pairs = [low.weave(high) for low, high in zip(picked[::2], picked[1::2], strict=True)]
    return pairs[0] if narrow else pairs[0].view(WORD).weave(pairs[1].view(WORD))


@inlined
def store_weight(value: Any, out: Any, to: int) -> None:
    """Stores the bits of a finite float32 at ``out[to]``, rounded to nearest even if ``out`` is bfloat16."""
    bits = float_bits(value)
    if out.itemsize == 2:
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out[to] = bits


@inlined
def look_up_portable(codes: Any, at: int, levels: Any, scale: Any, out: Any, to: int) -> None:
    """Decodes 16 weights from 8 bytes: ``out[to + k] = round(levels[code[k]] * scale)``.

    Args:
        codes: uint8, flat; the even weight in the high nibble.
        at: Index of the first byte.
        levels: 16 float32.
        scale: float32.
        out: uint16 (the bits of bfloat16) or uint32 (those of float32), flat.
        to: Index of the first weight.
    """
    for k in range(UNIT // 2):
        store_weight(levels[codes[at + k] >> 4] * scale, out, to + 2 * k)
        store_weight(levels[codes[at + k] & 15] * scale, out, to + 2 * k + 1)


@inlined
def look_up_portable_wide(codes: Any, at: int, levels: Any, scale: Any, out: Any, to: int) -> None:
    """``look_up_portable`` of 64 weights from 32 bytes."""
    for unit in range(WIDE // UNIT):
        look_up_portable(codes, at + unit * (UNIT // 2), levels, scale, out, to + unit * UNIT)


_SHUFFLE = find_shuffle()
#: The fastest look-ups on this processor.
look_up: Any = look_up_portable if _SHUFFLE is None else make_look_up(_SHUFFLE, UNIT)
look_up_wide: Any = look_up_portable_wide if _SHUFFLE is None else make_look_up(_SHUFFLE, WIDE)
if has_permute():
    look_up_wide = make_look_up(None, WIDE)
