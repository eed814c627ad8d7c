"""Numba kernels that decode codes of few bits with a float16 scale and zero per group.

Legend: O = rows, I = columns, C = bytes of codes in a row, N = groups in a row.

A weight is ``(code - zero) * scale`` in float32, rounded once. A row is one little-endian number: code ``k`` is in its
bits from ``k * bits`` on, so eight codes take as many bytes as a code has bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange, types

from ingle.kernels.numba.cache import Kernel, compile_kernel
from ingle.kernels.numba.nibble_lookup import store_weight
from ingle.kernels.numba.scalars import chunk_bounds, from_half, inlined
from ingle.kernels.numba.vector import ARRAY, DWORD, OFFSET, Array, Vector, make_intrinsic, splat

#: Weights decoded at once if a group has that many.
WIDE = 32
#: Codes that fill complete bytes, whatever their bits.
UNIT = 8


def read_codes(data: Array, bits: int, count: int) -> Vector:
    """Returns codes of 8, 4, 3 or 2 bits."""
    if bits == 8:
        return data.load(0, count)
    if bits == 3:  # eight codes are in three bytes, which are loaded for each of them
        num_bytes = 3 * count // 8
        order = [3 * (k // 8) + byte if byte < 3 else num_bytes for k in range(count) for byte in range(4)]
        words = data.load(0, num_bytes).take(order).view(DWORD)
        return (words >> [3 * (k % 8) for k in range(count)]) & 7
    raw = data.load(0, count * bits // 8)
    halves = (raw & 15).weave(raw >> 4)
    return halves if bits == 4 else (halves & 3).weave(halves >> 2)


def emit_decode(data: Array, scale: Any, zero: Any, out: Array, *, bits: int, count: int) -> None:
    """Decodes ``count`` weights; codes of one bit choose between two values."""
    scales, zeros = splat(data.builder, scale, count), splat(data.builder, zero, count)
    if bits == 1:
        weights = data.flags(0, count).choose((zeros.of(1.0) - zeros) * scales, (zeros.of(0.0) - zeros) * scales)
    else:
        weights = (read_codes(data, bits, count).to_float() - zeros) * scales
    out.store(0, weights)


@inlined
def decode_rest(data: Any, at: int, bits: int, length: int, scale: Any, zero: Any, out: Any, to: int) -> None:
    """Decodes fewer weights than a unit, one by one."""
    for k in range(length):
        place = at + (k * bits >> 3)
        word = np.uint32(data[place])
        if (k * bits & 7) + bits > 8:
            word |= np.uint32(data[place + 1]) << np.uint32(8)
        code = (word >> np.uint32(k * bits & 7)) & np.uint32((1 << bits) - 1)
        store_weight((np.float32(code) - zero) * scale, out, to + k)


def make_decoder(bits: int) -> Kernel:
    """Returns the kernel for codes of ``bits`` bits.

    Its arguments: ``codes`` uint8 ``[O, C]``; ``scales`` and ``zeros`` uint16 ``[O, N]``, bits of float16; ``size``,
    weights of a group, a multiple of 8 (the last group of a row may be short); ``out`` ``[O, I]``, bits of bfloat16
    (uint16) or float32 (uint32); ``num_chunks``, parts of the rows that threads work on.
    """
    kinds = (ARRAY, OFFSET, types.float32, types.float32, ARRAY, OFFSET)
    decode_wide = make_intrinsic(emit_decode, kinds, bits=bits, count=WIDE)
    decode_unit = make_intrinsic(emit_decode, kinds, bits=bits, count=UNIT)

    @inlined
    def decode_group(data: Any, at: int, length: int, scale: Any, zero: Any, out: Any, to: int) -> None:
        done = 0
        while length - done >= WIDE:
            decode_wide(data, at + (done * bits >> 3), scale, zero, out, to + done)
            done += WIDE
        while length - done >= UNIT:
            decode_unit(data, at + (done * bits >> 3), scale, zero, out, to + done)
            done += UNIT
        if done < length:
            decode_rest(data, at + (done * bits >> 3), bits, length - done, scale, zero, out, to + done)

    def decode(codes: Any, scales: Any, zeros: Any, size: int, out: Any, num_chunks: int) -> None:
        num_rows, num_columns = out.shape
        flat_codes, flat_out = codes.reshape(-1), out.reshape(-1)
        for chunk in prange(num_chunks):
            first, stop = chunk_bounds(chunk, num_rows, num_chunks)
            for row in range(first, stop):
                for group in range(scales.shape[1]):
                    scale, zero = from_half(scales[row, group]), from_half(zeros[row, group])
                    column = group * size
                    at, to = row * codes.shape[1] + column * bits // 8, row * num_columns + column
                    decode_group(flat_codes, at, min(size, num_columns - column), scale, zero, flat_out, to)

    return compile_kernel(decode, name=f"decode_{bits}_bits")


#: The kernels by the bits of a code.
KERNELS = {bits: make_decoder(bits) for bits in (8, 4, 3, 2, 1)}
