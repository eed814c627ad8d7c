"""Encoders of GGUF's k-quants, Q2_K to Q6_K, byte for byte as ggml's.

Source: ggml's ``ggml-quants.c`` (MIT license); docstrings name the corresponding functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ingle.kernels.ggml import search
from ingle.kernels.ggml.sub_blocks import (
    LANES,
    TINIEST,
    emit_again,
    emit_weights,
    find_largest_scale,
    find_scales_plain,
    lay_out,
    lay_out_importance,
    make_lanes,
    nearest,
    put_half,
    put_pairs,
    search_positive,
    weigh_32,
    weigh_by_block,
)
from ingle.kernels.numba.scalars import inlined

weigh_16 = make_lanes(emit_weights, count=16, kind="importance")


@inlined
def put_scales_and_mins(fields: Any, block: int, weighted: bool, levels: Any, lows: Any, data: Any, to: int) -> None:
    """Stores the scales of a Q4_K or Q5_K block in 16 bytes; fields 0 and 1 become the rounded scales and minima."""
    first = 8 * block
    if weighted:
        weights = fields[2 * LANES + first : 2 * LANES + first + 8]
        scale = search_positive(fields, first, 8, 63, weights, levels)
        minimum = search_positive(fields, LANES + first, 8, 63, weights, lows)
    else:
        scale = find_scales_plain(fields, first, 8, 63, 0, levels)
        minimum = find_scales_plain(fields, first, 8, 63, 1, lows)
    scale, minimum = put_half(scale, data, to), put_half(minimum, data, to + 2)
    for k in range(4):
        data[to + 4 + k] = levels[k] | (levels[k + 4] >> 4) << 6
        data[to + 8 + k] = lows[k] | (lows[k + 4] >> 4) << 6
        data[to + 12 + k] = (levels[k + 4] & 15) | (lows[k + 4] & 15) << 4
    for k in range(8):
        fields[first + k] = scale * np.float32(levels[k])
        fields[LANES + first + k] = minimum * np.float32(lows[k])


def make_q4_k_or_q5_k(
    *, block_bytes: int, top: int, low: int, high: int | None = None, start: float, steps: int
) -> Any:
    """Returns the encoder ``quantize_row_q4_K_ref`` or ``q5_K`` (with importance, ``_impl``), in groups of two blocks.

    Args:
        block_bytes: Bytes of a block.
        top: The highest code.
        low: First byte with four bits of each code.
        high: First byte with the fifth bits.
        start: First trial of the search that does not use importance.
        steps: Number of trials minus one.
    """
    find_weighted = make_lanes(search.emit_affine, count=32, top=top)
    find_plain = make_lanes(search.emit_affine, count=32, top=top, start=start, step=0.1, steps=steps)
    weigh_plain = make_lanes(emit_weights, count=32, kind="mean")
    encode_again = make_lanes(emit_again, count=32, low=0, high=top)
    has_fifth, fifth = high is not None, high or 0

    @inlined
    def encode_groups(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
        x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
        fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(8, np.int64), np.zeros(8, np.int64)
        for group in range(first, stop):
            at = group * 512
            num_lanes = min(LANES, (values.size - at) // 32)
            lay_out(values, at, 32, num_lanes, x)
            if importance.size:
                weigh_by_block(values, importance, at, 32, num_lanes, 2, w, fields)
                weigh_32(x, w, fields, codes)
                find_weighted(x, w, fields, codes)
            else:
                weigh_plain(x, w, fields, codes)
                find_plain(x, w, fields, codes)
            for block in range(num_lanes // 8):
                to = (2 * group + block) * block_bytes
                put_scales_and_mins(fields, block, importance.size > 0, levels, lows, data, to)
            encode_again(x, w, fields, codes)
            for block in range(num_lanes // 8):
                to = (2 * group + block) * block_bytes
                for byte in range(32):
                    line = byte * LANES + 8 * block
                    if has_fifth:
                        bits = np.uint8(0)
                        for lane in range(8):
                            bits |= (codes[line + lane] >> np.uint8(4)) << np.uint8(lane)
                        data[to + fifth + byte] = bits
                    for pair in range(4):
                        bits = codes[line + 2 * pair] & np.uint8(15)
                        data[to + low + 32 * pair + byte] = bits | codes[line + 2 * pair + 1] << np.uint8(4)

    return encode_groups


weigh_size = make_lanes(emit_weights, count=16, kind="size")
find_q2 = make_lanes(search.emit_affine, count=16, top=3)
find_q2_plain = make_lanes(search.emit_affine, count=16, top=3, start=-0.5, step=0.1, steps=15, absolute=True)
again_q2 = make_lanes(emit_again, count=16, low=0, high=3)


@inlined
def encode_q2_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q2_K_ref``, or ``_impl`` with importance; a group is one block."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(16, np.int64), np.zeros(16, np.int64)
    for block in range(first, stop):
        at, to = 256 * block, 84 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            weigh_by_block(values, importance, at, 16, LANES, 1, w, fields)
            weigh_16(x, w, fields, codes)
            find_q2(x, w, fields, codes)
            weights = fields[2 * LANES :]
            scale = search_positive(fields, 0, 16, 15, weights, levels)
            minimum = search_positive(fields, LANES, 16, 15, weights, lows)
        else:
            weigh_size(x, w, fields, codes)
            find_q2_plain(x, w, fields, codes)
            scale = find_scales_plain(fields, 0, 16, 15, 0, levels)
            minimum = find_scales_plain(fields, 0, 16, 15, 1, lows)
        scale, minimum = put_half(scale, data, to + 80), put_half(minimum, data, to + 82)
        for k in range(16):
            data[to + k] = levels[k] | lows[k] << 4
            fields[k] = scale * np.float32(levels[k])
            fields[LANES + k] = minimum * np.float32(lows[k])
        again_q2(x, w, fields, codes)
        put_pairs(codes, data, to + 16)


find_q3 = make_lanes(search.emit_symmetric, count=16, top=4)
find_q3_plain = make_lanes(search.emit_descent, count=16, top=4)
find_scale = make_lanes(search.emit_symmetric, count=16, top=32)
again_q3 = make_lanes(emit_again, count=16, low=-4, high=3)


@inlined
def encode_q3_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q3_K_ref``, or ``_impl`` with importance; a group is one block."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields, levels = np.zeros(3 * LANES, np.float32), np.zeros(16, np.int64)
    # Stores the scales of a block as the first of 16 sub-blocks side by side, so that the same search applies to them.
    scales, weights = np.zeros(16 * LANES, np.float32), np.zeros(16 * LANES, np.float32)
    found, chosen = np.zeros(3 * LANES, np.float32), np.zeros(16 * LANES, np.uint8)
    for block in range(first, stop):
        at, to = 256 * block, 110 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            weigh_by_block(values, importance, at, 16, LANES, 2, w, fields)
            weigh_16(x, w, fields, codes)
            find_q3(x, w, fields, codes)
            for k in range(16):
                scales[k * LANES], weights[k * LANES] = fields[k], fields[2 * LANES + k]
            find_scale(scales, weights, found, chosen)
            scale = found[0]
            for k in range(16):
                levels[k] = chosen[k * LANES]
        else:
            find_q3_plain(x, w, fields, codes)
            largest = find_largest_scale(fields)
            scale = np.float32(0)
            if largest != 0:
                inverse = np.float32(-32) / largest
                scale = np.float32(1) / inverse
                for k in range(16):
                    levels[k] = max(-32, min(31, nearest(inverse * fields[k]))) + 32
            else:
                levels[:] = 0
        scale = put_half(scale, data, to + 108)
        for k in range(8):
            data[to + 96 + k] = (levels[k] & 15) | (levels[k + 8] & 15) << 4
        for k in range(4):
            high = levels[k] >> 4 | levels[k + 4] >> 4 << 2 | levels[k + 8] >> 4 << 4 | levels[k + 12] >> 4 << 6
            data[to + 104 + k] = high
        for k in range(16):
            fields[k] = scale * np.float32(levels[k] - 32)
            fields[LANES + k] = np.float32(0)
        again_q3(x, w, fields, codes)
        for byte in range(32):
            high_bits = np.uint8(0)
            for part in range(8):
                code = codes[(byte % 16) * LANES + 2 * part + byte // 16]
                high_bits |= (code >> np.uint8(2)) << np.uint8(part)
            data[to + byte] = high_bits
        put_pairs(codes, data, to + 32)


weigh_square = make_lanes(emit_weights, count=16, kind="square")
again_q6 = make_lanes(emit_again, count=16, low=-32, high=31)


@inlined
def encode_q6_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q6_K_ref``, or ``_impl`` with importance; a group is one block."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for block in range(first, stop):
        at, to = 256 * block, 210 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            lay_out_importance(importance, at, 16, LANES, w)
        else:
            weigh_square(x, w, fields, codes)
        find_scale(x, w, fields, codes)
        largest = find_largest_scale(fields)
        if abs(largest) < np.float32(TINIEST):
            data[to : to + 210] = 0
            continue
        inverse = np.float32(-128) / largest
        scale = put_half(np.float32(1) / inverse, data, to + 208)
        for k in range(16):
            level = min(127, nearest(inverse * fields[k]))
            data[to + 192 + k] = np.uint8(level & 255)
            fields[k] = scale * np.float32(level)
            fields[LANES + k] = np.float32(0)
        again_q6(x, w, fields, codes)
        for half in range(2):
            for byte in range(32):
                line, lane = (byte % 16) * LANES, 8 * half + byte // 16
                one, two, three, four = (
                    codes[line + lane],
                    codes[line + lane + 2],
                    codes[line + lane + 4],
                    codes[line + lane + 6],
                )
                low = np.uint8(15)
                data[to + 64 * half + byte] = (one & low) | (three & low) << np.uint8(4)
                data[to + 64 * half + 32 + byte] = (two & low) | (four & low) << np.uint8(4)
                high = one >> np.uint8(4) | two >> np.uint8(4) << np.uint8(2)
                high |= three >> np.uint8(4) << np.uint8(4) | four >> np.uint8(4) << np.uint8(6)
                data[to + 128 + 32 * half + byte] = high


#: By ``base.format``: what encodes some groups of weights, and the weights of a group.
K_FORMATS = {
    "q2_k": (encode_q2_k, 256),
    "q3_k": (encode_q3_k, 256),
    "q4_k": (make_q4_k_or_q5_k(block_bytes=144, top=15, low=16, start=-1.0, steps=20), 512),
    "q5_k": (make_q4_k_or_q5_k(block_bytes=176, top=31, low=48, high=16, start=-0.5, steps=15), 512),
    "q6_k": (encode_q6_k, 256),
}
