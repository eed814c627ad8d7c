"""Packed weights on the CPU, decoded by numba: no compiler is needed on the user's machine.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = blocks in a row.  ``out`` holds bits: ``uint16`` is
bfloat16, ``uint32`` is float32.

A 16-level format is decoded inside vector registers: the 16 products ``level * scale`` of a block are rounded once to
the output type, split into bytes, and a byte shuffle (SSSE3's ``pshufb``, NEON's ``tbl``) picks from them by code.
LLVM's own vectoriser cannot find this, and compiles a look-up into single loads at a tenth of the speed.  Processors
without such a shuffle take ``look_up_portable``, with the same results.

Threads: on Linux numba's OpenMP layer and torch share libgomp, and with it the very threads.  A second pool would
fight with torch's, whose threads spin for a while after every product.  Every row is computed by one thread in one
order, so results do not depend on how many there are.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from ingle.kernels.cpu_cache import compile_kernel

#: Weights decoded by one look-up.
UNIT = 16
#: Weights decoded in one go where a block has as many: without loops in between, at twice the speed.
WIDE = 64
#: 1 / 127 as bitsandbytes spells it.
RECIPROCAL = np.float32(7.874015718698502e-3)
#: log2 of the number of absmax values that share one nested absmax.
NESTED_SHIFT = 8

_BYTE, _WORD, _DWORD, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def find_shuffle() -> str | None:
    """LLVM's name of this processor's 16-byte shuffle, or None."""
    if numba.config.CPU_NAME is not None or numba.config.CPU_FEATURES is not None:
        return None  # numba was told to compile for another processor than this one
    match platform.machine().lower():
        case "x86_64" | "amd64":
            return "llvm.x86.ssse3.pshuf.b.128" if binding.get_host_cpu_features().get("ssse3") else None
        case "aarch64" | "arm64":
            return "llvm.aarch64.neon.tbl1.v16i8"
    return None


def make_look_up(shuffle: str, count: int) -> Any:
    """``look_up_portable`` of ``count`` weights by a byte shuffle of that name, for numba's kernels to call."""

    @intrinsic  # type: ignore[untyped-decorator]
    def look_up_vector(_: Any, codes: Any, at: Any, levels: Any, scale: Any, out: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            codes, at, levels, scale, out, to = arguments
            table = _load(builder, _address(context, builder, kinds[2], levels), _FLOAT, UNIT)
            # Nobody writes the levels, so the products of a block are computed once for all its units.
            table.set_metadata("invariant.load", builder.module.add_metadata([]))
            products = builder.bitcast(builder.fmul(table, _splat(builder, scale)), ir.VectorType(_DWORD, UNIT))
            for unit in range(count // UNIT):
                first = builder.add(at, at.type(unit * UNIT // 2))
                packed = _load(builder, _address(context, builder, kinds[0], codes, first), _BYTE, UNIT // 2)
                decoded = _pick(builder, products, packed, shuffle, narrow=kinds[4].dtype == types.uint16)
                place = _address(context, builder, kinds[4], out, builder.add(to, to.type(unit * UNIT)))
                builder.store(decoded, builder.bitcast(place, decoded.type.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(codes, at, levels, scale, out, to), generate

    return look_up_vector


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


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def split(chunk: Any, num_rows: Any, num_chunks: Any) -> Any:
    """First row of a chunk and of the next."""
    signed = np.int64(chunk)  # numba counts chunks unsigned, which times a signed number is a float
    return signed * num_rows // num_chunks, (signed + 1) * num_rows // num_chunks


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def decode_row(codes_C: Any, at: int, levels: Any, scales_N: Any, block_size: int, out: Any, to: int, num: int) -> None:
    """Decodes one row of 16-level codes: whole units by look-up, then what is left one by one.

    Args:
        codes_C: uint8, flat; the row starts at ``at``.
        at: Index of the row's first byte.
        levels: 16 float32.
        scales_N: float32, of the row's blocks.
        block_size: Weights of a block, a multiple of 16; the last may be short.
        out: Flat; the row starts at ``to``.
        to: Index of the row's first weight.
        num: Weights of the row.
    """
    for block in range(scales_N.size):
        start = block * block_size
        length = min(block_size, num - start)
        scale = scales_N[block]
        for wide in range(length // WIDE):
            k = start + wide * WIDE
            look_up_wide(codes_C, at + (k >> 1), levels, scale, out, to + k)
        for unit in range(length // WIDE * (WIDE // UNIT), length // UNIT):
            k = start + unit * UNIT
            look_up(codes_C, at + (k >> 1), levels, scale, out, to + k)
        for k in range(start + length // UNIT * UNIT, start + length):
            code = np.int64(codes_C[at + (k >> 1)]) >> (4 - (k & 1) * 4)
            put(levels[code & 15] * scale, out, to + k)


@compile_kernel
def decode_levels(codes: Any, levels: Any, scales: Any, block_size: int, out: Any, num_chunks: int) -> None:
    """Decodes 16-level codes with float32 scales.

    Args:
        codes: uint8 ``[O, C]``.
        levels: 16 float32.
        scales: float32 ``[O, N]``.
        block_size: Weights that share a scale.
        out: ``[O, I]``.
        num_chunks: Parts the rows are split into.
    """
    num_rows, num_columns = out.shape
    flat_codes, flat_out = codes.reshape(-1), out.reshape(-1)
    for chunk in prange(num_chunks):
        first, stop = split(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            at, to = row * codes.shape[1], row * num_columns
            decode_row(flat_codes, at, levels, scales[row], block_size, flat_out, to, num_columns)


@compile_kernel
def decode_nested_levels(
    codes: Any,
    levels: Any,
    scale_codes: Any,
    scale_levels: Any,
    nested: Any,
    offset: Any,
    block_size: int,
    out: Any,
    num_chunks: int,
) -> None:
    """Decodes 16-level codes whose scales are packed too: ``scale_levels[code] * nested + offset``.

    Args:
        codes: uint8 ``[O, C]``.
        levels: 16 float32.
        scale_codes: uint8 ``[O, N]``.
        scale_levels: 256 float32.
        nested: float32, one for 256 consecutive scales of the flattened matrix.
        offset: One float32.
        block_size: Weights that share a scale.
        out: ``[O, I]``.
        num_chunks: Parts the rows are split into.
    """
    num_rows, num_columns = out.shape
    num_blocks = scale_codes.shape[1]
    flat_codes, flat_out = codes.reshape(-1), out.reshape(-1)
    for chunk in prange(num_chunks):
        scales = np.empty(num_blocks, np.float32)
        first, stop = split(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            for block in range(num_blocks):
                scaled = scale_levels[scale_codes[row, block]] * nested[(row * num_blocks + block) >> NESTED_SHIFT]
                scales[block] = scaled + offset[0]
            at, to = row * codes.shape[1], row * num_columns
            decode_row(flat_codes, at, levels, scales, block_size, flat_out, to, num_columns)


@compile_kernel
def decode_int8(codes: Any, scales: Any, out: Any, num_chunks: int) -> None:
    """Decodes rows of signed bytes: ``code * scale * (1 / 127)``.

    Args:
        codes: int8 ``[O, I]``.
        scales: float32 ``[O]``.
        out: ``[O, I]``.
        num_chunks: Parts the rows are split into.
    """
    num_rows = out.shape[0]
    for chunk in prange(num_chunks):
        first, stop = split(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            from_row, to_row, scale = codes[row], out[row], scales[row]
            for k in range(from_row.size):
                put(np.float32(from_row[k]) * scale * RECIPROCAL, to_row, k)
