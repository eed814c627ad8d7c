"""Packing weights into GGUF's ternary formats on the CPU, byte for byte as ggml's reference does.

Arrays of a kernel: ``values`` float32, flat, whole rows; ``importance`` float32, of one row, or empty; ``data`` uint8,
flat, written.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from ingle.kernels.ggml.block import invert_size, lay_out, put_half, share
from ingle.kernels.ggml.lanes import LANES, make_lanes, write_extremes, write_rounds
from ingle.kernels.numba.cache import compile_kernel

#: The passes and searches of these formats.
extremes_256 = make_lanes(write_extremes, count=256)
rounds_trits = make_lanes(write_rounds, count=256, limit=1, bias=1)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_tq1_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_tq1_0_ref``: groups of 16 blocks; importance is not used."""
    x, w, codes = np.empty(256 * LANES, np.float32), np.empty(0, np.float32), np.empty(256 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 256 * LANES
        num_lanes = min(LANES, (values.size - at) // 256)
        lay_out(values, at, 256, num_lanes, x)
        extremes_256(x, w, fields, codes)
        invert_size(fields, 1)
        rounds_trits(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 54
            put_half(fields[2 * LANES + lane], data, to + 52)
            for byte in range(52):
                # 160 weights five to a byte, 80 likewise, the last 16 four to a byte.
                start, width = (byte, 32) if byte < 32 else ((128 + byte, 16) if byte < 48 else (192 + byte, 4))
                packed = np.int64(0)
                for number in range(5):
                    trit = (
                        np.int64(codes[(start + number * width) * LANES + lane])
                        if byte < 48 or number < 4
                        else np.int64(0)
                    )
                    packed = 3 * packed + trit
                data[to + byte] = (packed * 256 + 242) // 243


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_tq2_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_tq2_0_ref``: groups of 16 blocks; importance is not used."""
    x, w, codes = np.empty(256 * LANES, np.float32), np.empty(0, np.float32), np.empty(256 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 256 * LANES
        num_lanes = min(LANES, (values.size - at) // 256)
        lay_out(values, at, 256, num_lanes, x)
        extremes_256(x, w, fields, codes)
        invert_size(fields, 1)
        rounds_trits(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 66
            put_half(fields[2 * LANES + lane], data, to + 64)
            for byte in range(64):
                start, packed = 128 * (byte // 32) + byte % 32, np.uint8(0)
                for quarter in range(4):
                    packed |= codes[(start + 32 * quarter) * LANES + lane] << np.uint8(2 * quarter)
                data[to + byte] = packed


@compile_kernel
def encode_tq1_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs TQ1_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 4096), num_chunks)
        pack_tq1_0(values, importance, data, first, stop)


@compile_kernel
def encode_tq2_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs TQ2_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 4096), num_chunks)
        pack_tq2_0(values, importance, data, first, stop)
