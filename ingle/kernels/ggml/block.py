"""What the packing kernels of GGUF's formats share: laying weights side by side, float16, codes into bytes.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from ingle.kernels.ggml.lanes import LANES
from ingle.kernels.levels.encode import from_bits
from ingle.kernels.numba.lookup import float_bits

#: ``(v + ROUND) - ROUND`` rounds half to even.
ROUND = np.float32(12582912.0)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def to_half(value: Any) -> Any:
    """The bits of the nearest float16, half to even."""
    bits = float_bits(np.float32(value))
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    bits &= np.uint32(0x7FFFFFFF)
    if bits >= np.uint32(0x47800000):
        half = np.uint32(0x7E00) if bits > np.uint32(0x7F800000) else np.uint32(0x7C00)
    elif bits < np.uint32(0x38800000):  # float32 addition rounds where a small float16 ends
        half = float_bits(from_bits(bits) + np.float32(0.5)) - np.uint32(0x3F000000)
    else:
        half = (
            bits - np.uint32(0x38000000) + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        ) >> np.uint32(13)
    return np.uint16(half | sign)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def from_half(half: Any) -> Any:
    """The float32 of a float16's bits."""
    magnitude = np.uint32(half) & np.uint32(0x7FFF)
    if magnitude < np.uint32(0x400):
        value = np.float32(magnitude) * np.float32(2.0**-24)
    elif magnitude < np.uint32(0x7C00):
        value = from_bits((magnitude << np.uint32(13)) + np.uint32(0x38000000))
    else:
        value = from_bits((magnitude << np.uint32(13)) | np.uint32(0x7F800000))
    return -value if half & np.uint16(0x8000) else value


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_half(value: Any, data: Any, at: int) -> Any:
    """Stores a float16 as two bytes and returns its float32."""
    half = to_half(value)
    data[at] = half & np.uint16(255)
    data[at + 1] = half >> np.uint16(8)
    return from_half(half)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def nearest(value: Any) -> Any:
    """``nearest_int``: half to even."""
    return np.int64((value + ROUND) - ROUND)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def share(chunk: Any, num_blocks: Any, num_chunks: Any) -> Any:
    """First group of a chunk and of the next."""
    signed = np.int64(chunk)  # numba counts chunks unsigned, which times a signed number is a float
    return signed * num_blocks // num_chunks, (signed + 1) * num_blocks // num_chunks


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def lay_out(values: Any, at: int, count: int, num_lanes: int, x: Any) -> None:
    """Puts consecutive sub-blocks side by side; missing ones are zeros."""
    for lane in range(num_lanes):
        for k in range(count):
            x[k * LANES + lane] = values[at + lane * count + k]
    for lane in range(num_lanes, LANES):
        for k in range(count):
            x[k * LANES + lane] = np.float32(0)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def lay_out_importance(importance: Any, at: int, count: int, num_lanes: int, w: Any) -> None:
    """The importance of the columns of sub-blocks side by side; of missing ones zero."""
    for lane in range(LANES):
        column = (at + lane * count) % importance.size
        for k in range(count):
            w[k * LANES + lane] = importance[column + k] if lane < num_lanes else np.float32(0)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def sum_squares(values: Any, at: int, count: int) -> Any:
    """Their sum, one after the other in float32."""
    total = np.float32(0)
    for k in range(at, at + count):
        total += values[k] * values[k]
    return total


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def invert_size(fields: Any, parts: Any) -> None:
    """``d = |largest| / parts``: fields 0 becomes its inverse, 2 becomes d."""
    for lane in range(LANES):
        scale = abs(fields[lane]) / np.float32(parts)
        fields[lane] = np.float32(1) / scale if scale != 0 else np.float32(0)
        fields[2 * LANES + lane] = scale


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def find_largest_scale(fields: Any) -> Any:
    """The scale of largest size, the first of several, with its sign; zero where all are."""
    size, value = np.float32(0), np.float32(0)
    for k in range(min(LANES, fields.size)):
        if abs(fields[k]) > size:
            size, value = abs(fields[k]), fields[k]
    return value


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_nibbles(codes: Any, lane: int, data: Any, at: int) -> None:
    """Packs 32 codes of four bits: the first 16 in low halves of bytes, the others in high ones."""
    for k in range(16):
        low, high = codes[k * LANES + lane], codes[(k + 16) * LANES + lane]
        data[at + k] = (low & np.uint8(15)) | (high << np.uint8(4))


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_pairs(codes: Any, data: Any, to: int) -> None:
    """Packs 256 codes of two bits, 16 sub-blocks of 16 side by side, into 64 bytes."""
    for half in range(2):
        for byte in range(32):
            packed = np.uint8(0)
            for quarter in range(4):
                lane = 8 * half + 2 * quarter + byte // 16
                packed |= (codes[(byte % 16) * LANES + lane] & np.uint8(3)) << np.uint8(2 * quarter)
            data[to + 32 * half + byte] = packed
