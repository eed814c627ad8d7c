"""Sixteen levels looked up by 4-bit codes, inside vector registers.

The 16 products ``level * scale`` of a block are rounded once to the output type, and a shuffle picks from them by code:

- processors with AVX-512BW take whole products, 32 bfloat16 or 16 float32 at a time (``vpermw``, ``vpermps``);
- others with a 16-byte shuffle (SSSE3's ``pshufb``, NEON's ``tbl``) take the bytes of products, 16 at a time;
- the rest takes ``look_up_portable``.

All give the same results.  LLVM's own vectoriser finds none of this, and compiles a look-up into single loads at a
tenth of the speed.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

#: Weights decoded by one look-up.
UNIT = 16
#: Weights decoded in one go where a block has as many: without loops in between, at twice the speed.
WIDE = 64

_BYTE, _WORD, _DWORD, _QWORD = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()


def find_shuffle() -> str | None:
    """LLVM's name of this processor's 16-byte shuffle, or None."""
    match platform.machine().lower():
        case "x86_64" | "amd64":
            return "llvm.x86.ssse3.pshuf.b.128" if _has("ssse3") else None
        case "aarch64" | "arm64":
            return "llvm.aarch64.neon.tbl1.v16i8" if not _is_told() or _has("neon") else None
    return None


def has_permute() -> bool:
    """Whether this processor permutes 64 bytes in whole words (AVX-512BW)."""
    return platform.machine().lower() in ("x86_64", "amd64") and _has("avx512bw")


def _is_told() -> bool:
    """Whether numba compiles for the processor that ``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` describe."""
    return numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None


def _has(feature: str) -> bool:
    """Whether numba compiles for a processor with a feature of LLVM's; one that is described has what is listed."""
    if _is_told():
        return f"+{feature}" in (numba.config.CPU_FEATURES or "").split(",")
    return bool(binding.get_host_cpu_features().get(feature))


def make_look_up(shuffle: str | None, count: int) -> Any:
    """``look_up_portable`` of ``count`` weights for numba's kernels to call, by a byte shuffle or whole words.

    Args:
        shuffle: LLVM's name of a 16-byte shuffle; None takes AVX-512BW's permutes.
        count: Weights decoded in one go: a multiple of 16, and of 32 for the permutes.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def look_up_vector(_: Any, codes: Any, at: Any, levels: Any, scale: Any, out: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            codes, at, levels, scale, out, to = arguments
            table = _load(builder, _address(context, builder, kinds[2], levels), _FLOAT, UNIT)
            # Nobody writes the levels, so the products of a block are computed once for all its units.
            table.set_metadata("invariant.load", builder.module.add_metadata([]))
            products = builder.bitcast(builder.fmul(table, _splat(builder, scale)), ir.VectorType(_DWORD, UNIT))
            narrow = kinds[4].dtype == types.uint16
            size = 2 * UNIT if narrow and shuffle is None else UNIT
            for start in range(0, count, size):
                first = builder.add(at, at.type(start // 2))
                packed = _load(builder, _address(context, builder, kinds[0], codes, first), _BYTE, size // 2)
                decoded = (
                    _permute(builder, products, packed, narrow)
                    if shuffle is None
                    else _pick(builder, products, packed, shuffle, narrow)
                )
                place = _address(context, builder, kinds[4], out, builder.add(to, to.type(start)))
                builder.store(decoded, builder.bitcast(place, decoded.type.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(codes, at, levels, scale, out, to), generate

    return look_up_vector


def _permute(builder: Any, products: Any, packed: Any, narrow: bool) -> Any:
    """The products that 32 codes name as bfloat16 if narrow, else those that 16 codes name as float32.

    A byte is spread over two elements of the index, the even weight's high nibble first.  The second is the whole byte:
    the permute heeds its lowest bits alone, five of them where words are picked, so that table holds everything twice.
    """
    bits, pair = (16, _DWORD) if narrow else (32, _QWORD)
    spread = builder.zext(packed, ir.VectorType(pair, packed.type.count))
    high = builder.lshr(spread, _fill(pair, packed.type.count, 4))
    index = builder.or_(high, builder.shl(spread, _fill(pair, packed.type.count, bits)))
    if narrow:
        halves = _round_halves(builder, products)
        order = ir.Constant(ir.VectorType(_DWORD, 2 * UNIT), [*range(UNIT), *range(UNIT)])
        table, name = builder.shuffle_vector(halves, halves, order), "llvm.x86.avx512.permvar.hi.512"
    else:
        table, name = products, "llvm.x86.avx512.permvar.si.512"
    kind = ir.FunctionType(table.type, [table.type, table.type])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [table, builder.bitcast(index, table.type)])


def _pick(builder: Any, products: Any, packed: Any, shuffle: str, narrow: bool) -> Any:
    """The products that 16 codes name, as bytes in memory order; bfloat16 if narrow, else float32."""
    high = builder.lshr(packed, _fill(_BYTE, UNIT // 2, 4))
    low = builder.and_(packed, _fill(_BYTE, UNIT // 2, 15))
    index = _interleave(builder, high, low)
    kind = ir.FunctionType(index.type, [index.type, index.type])
    function = cgutils.get_or_insert_function(builder.module, kind, shuffle)
    values = _round_halves(builder, products) if narrow else products
    picked = [builder.call(function, [_byte(builder, values, k), index]) for k in range(2 if narrow else 4)]
    if narrow:
        return _interleave(builder, *picked)
    words = ir.VectorType(_WORD, UNIT)
    lower = builder.bitcast(_interleave(builder, picked[0], picked[1]), words)
    upper = builder.bitcast(_interleave(builder, picked[2], picked[3]), words)
    return _interleave(builder, lower, upper)


def _round_halves(builder: Any, bits: Any) -> Any:
    """The upper halves of float32 bits, rounded to nearest even: bfloat16."""
    odd = builder.and_(builder.lshr(bits, _fill(_DWORD, UNIT, 16)), _fill(_DWORD, UNIT, 1))
    rounded = builder.add(builder.add(bits, _fill(_DWORD, UNIT, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _fill(_DWORD, UNIT, 16)), ir.VectorType(_WORD, UNIT))


def _byte(builder: Any, values: Any, number: int) -> Any:
    """One byte of every element, the lowest is number 0."""
    shifted = builder.lshr(values, _fill(values.type.element, UNIT, 8 * number))
    return builder.trunc(shifted, ir.VectorType(_BYTE, UNIT))


def _interleave(builder: Any, even: Any, odd: Any) -> Any:
    count = even.type.count
    order = [index for i in range(count) for index in (i, count + i)]
    return builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(_DWORD, 2 * count), order))


def _splat(builder: Any, value: Any) -> Any:
    vector = builder.insert_element(ir.Constant(ir.VectorType(_FLOAT, UNIT), ir.Undefined), value, _DWORD(0))
    return builder.shuffle_vector(vector, vector, _fill(_DWORD, UNIT, 0))


def _fill(kind: Any, count: int, value: int) -> Any:
    return ir.Constant(ir.VectorType(kind, count), [value] * count)


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any = None) -> Any:
    start = context.make_array(kind)(context, builder, array).data
    return start if index is None else builder.gep(start, [index])


def _load(builder: Any, address: Any, element: Any, count: int) -> Any:
    loaded = builder.load(builder.bitcast(address, ir.VectorType(element, count).as_pointer()))
    loaded.align = 1
    return loaded


@intrinsic  # type: ignore[untyped-decorator]
def float_bits(_: Any, value: Any) -> tuple[Any, Any]:
    """The bits of a float32, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _DWORD)

    return types.uint32(types.float32), generate


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put(value: Any, out: Any, to: int) -> None:
    """Stores the bits of a float32 at ``out[to]``; rounded to nearest even where ``out`` holds bfloat16."""
    bits = float_bits(value)
    if out.itemsize == 2:
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out[to] = bits


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
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
        put(levels[codes[at + k] >> 4] * scale, out, to + 2 * k)
        put(levels[codes[at + k] & 15] * scale, out, to + 2 * k + 1)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def look_up_portable_wide(codes: Any, at: int, levels: Any, scale: Any, out: Any, to: int) -> None:
    """``look_up_portable`` of 64 weights from 32 bytes."""
    for unit in range(WIDE // UNIT):
        look_up_portable(codes, at + unit * (UNIT // 2), levels, scale, out, to + unit * UNIT)


_SHUFFLE = find_shuffle()
#: The fastest look-ups this processor has.
look_up: Any = look_up_portable if _SHUFFLE is None else make_look_up(_SHUFFLE, UNIT)
look_up_wide: Any = look_up_portable_wide if _SHUFFLE is None else make_look_up(_SHUFFLE, WIDE)
if has_permute():
    look_up_wide = make_look_up(None, WIDE)
