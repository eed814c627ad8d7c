"""Numba kernels that decode 16-level formats and int8 on the CPU.

:mod:`ingle.kernels.levels.dispatch` describes the arguments of the kernels, in the same order. Here ``out`` contains
the bits of floats: ``uint16`` for bfloat16, ``uint32`` for float32. Threads work on ``num_chunks`` parts of the rows.

Legend: C = bytes of codes in a row, N = blocks in a row.

On Linux numba's OpenMP layer and torch share libgomp, and with it the threads. A second pool would compete
with torch's, whose threads spin for a while after every product. One thread computes a row, in one order, so results
do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from ingle.kernels.numba.cache import compile_kernel
from ingle.kernels.numba.nibble_lookup import UNIT, WIDE, look_up, look_up_wide, store_weight
from ingle.kernels.numba.scalars import chunk_bounds, inlined

#: 1 / 127 as bitsandbytes writes it.
RECIPROCAL = np.float32(7.874015718698502e-3)
#: log2 of the number of absmax values that share one nested absmax.
NESTED_SHIFT = 8


@inlined
def decode_row(codes_C: Any, at: int, levels: Any, scales_N: Any, block_size: int, out: Any, to: int, num: int) -> None:
    """Decodes one row of 16-level codes: complete units by look-up, and then the remaining weights one by one.

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
            store_weight(levels[code & 15] * scale, out, to + k)


@compile_kernel
def decode_levels(codes: Any, levels: Any, scales: Any, block_size: int, out: Any, num_chunks: int) -> None:
    """Decodes 16-level codes with float32 scales."""
    num_rows, num_columns = out.shape
    flat_codes, flat_out = codes.reshape(-1), out.reshape(-1)
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            at, to = row * codes.shape[1], row * num_columns
            decode_row(flat_codes, at, levels, scales[row], block_size, flat_out, to, num_columns)


@compile_kernel
def decode_nested_levels(
    codes: Any, levels: Any, scale_codes: Any, scale_levels: Any, nested: Any, offset: Any,
    block_size: int, out: Any, num_chunks: int,
) -> None:  # fmt: skip
    """Decodes 16-level codes whose scales are quantized too: ``scale_levels[code] * nested + offset``."""
    num_rows, num_columns = out.shape
    num_blocks = scale_codes.shape[1]
    flat_codes, flat_out = codes.reshape(-1), out.reshape(-1)
    for chunk in prange(num_chunks):
        scales = np.empty(num_blocks, np.float32)
        first, stop = chunk_bounds(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            for block in range(num_blocks):
                scaled = scale_levels[scale_codes[row, block]] * nested[(row * num_blocks + block) >> NESTED_SHIFT]
                scales[block] = scaled + offset[0]
            at, to = row * codes.shape[1], row * num_columns
            decode_row(flat_codes, at, levels, scales, block_size, flat_out, to, num_columns)


@compile_kernel
def decode_int8(codes: Any, scales: Any, out: Any, num_chunks: int) -> None:
    """Decodes rows of signed bytes: ``code * scale * (1 / 127)``."""
    num_rows = out.shape[0]
    for chunk in prange(num_chunks):
        first, stop = chunk_bounds(chunk, num_rows, num_chunks)
        for row in range(first, stop):
            from_row, to_row, scale = codes[row], out[row], scales[row]
            for k in range(from_row.size):
                store_weight(np.float32(from_row[k]) * scale * RECIPROCAL, to_row, k)
