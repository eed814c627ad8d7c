"""Functions that the encoders of GGUF's formats share: passes over sixteen sub-blocks at once, and storage of codes.

ggml searches the scales of a block with sums whose order affects the last bits, so nothing here is reordered. Speed
comes from processing sixteen sub-blocks side by side in vector registers: element ``k`` of all sixteen, then ``k + 1``.

Arrays of kernels: ``x`` and ``w`` contain the values of 16 sub-blocks side by side and the weights of their errors,
``fields`` rows with 16 float32 results each, and ``codes`` the codes as uint8.

Source: ggml's ``ggml-quants.c`` (MIT license); docstrings name the corresponding functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ingle.kernels.numba.scalars import from_half, inlined, to_half
from ingle.kernels.numba.vector import ARRAY, BYTE, ROUNDER, Array, Variable, Vector, fill, make_intrinsic, repeat

#: Sub-blocks side by side.
LANES = 16
#: Below this a block counts as zero.
TINIEST = 1e-15


def make_lanes(emit: Callable[..., None], **options: Any) -> Any:
    """Returns a function for kernels, ``f(x, w, fields, codes)``, from one that emits its code."""
    return make_intrinsic(emit, (ARRAY, ARRAY, ARRAY, ARRAY), **options)


def each(x: Array, count: int, body: Callable[[Any], None], *, first: int = 0) -> None:
    """Emits a loop over the elements of sub-blocks; ``body`` gets the index in ``x`` of an element of all sixteen."""

    def step(index: Any) -> None:
        body(x.builder.add(x.builder.mul(index, index.type(LANES)), index.type(LANES * first)))

    repeat(x.builder, count - first, step)


def store_codes(codes: Array, place: Any, values: Vector) -> None:
    """Stores integral floats as bytes."""
    codes.store(place, values.to_int().narrow(BYTE))


def find_largest(x: Array, count: int) -> tuple[Vector, Vector]:
    """Returns the largest magnitude of each sub-block, and the first value with that magnitude, with its sign."""
    zero = fill(x.builder, 0.0, LANES)
    size, value = Variable(zero), Variable(zero)

    def look(place: Any) -> None:
        v = x.load(place, LANES)
        larger = v.size() > size.get()
        size.set(larger.choose(v.size(), size.get()))
        value.set(larger.choose(v, value.get()))

    each(x, count, look)
    return size.get(), value.get()


def emit_trits(x: Array, w: Array, fields: Array, codes: Array, *, count: int) -> None:
    """Sets field 0 to the largest magnitude, and codes to ``roundf(x / field 0) + 1``, or 1 if the field is zero."""
    size, _ = find_largest(x, count)
    fields.store(0, size)
    inverse = size.same(0.0).choose(0.0, 1.0 / size)

    def put(place: Any) -> None:
        v = (x.load(place, LANES) * inverse).at_least(-1.0).at_most(1.0)
        store_codes(codes, place, v.round_half_away() + 1.0)

    each(x, count, put)


def emit_again(x: Array, w: Array, fields: Array, codes: Array, *, count: int, low: int, high: int) -> None:
    """Sets codes to ``(x + field 1) / field 0 - low``, from 0 to ``high - low``, unless the scale, field 0, is 0."""
    scale, offset = fields.load(0, LANES), fields.load(LANES, LANES)
    is_zero = scale.same(0.0)

    def put(place: Any) -> None:
        v = ((x.load(place, LANES) + offset) / scale).at_least(float(low)).at_most(float(high)).round()
        fresh = (v - float(low)).to_int().narrow(BYTE)
        codes.store(place, is_zero.choose(codes.load(place, LANES), fresh))

    each(x, count, put)


def emit_weights(x: Array, w: Array, fields: Array, codes: Array, *, count: int, kind: str) -> None:
    """Computes weights of the errors in ``w``, and their sums in field 2.

    ``importance``: the importance in ``w`` times ``sqrt(field 0 + x^2)``; ``size``: ``|x|``; ``mean``: the root mean
    square plus ``|x|``; ``square``: ``x^2``.
    """
    zero = fill(x.builder, 0.0, LANES)
    base, total = Variable(fields.load(0, LANES)), Variable(zero)
    if kind == "mean":

        def add(place: Any) -> None:
            v = x.load(place, LANES)
            total.set(total.get() + v * v)

        each(x, count, add)
        base.set((total.get() / float(count)).root())
        total.set(zero)

    def put(place: Any) -> None:
        v = x.load(place, LANES)
        match kind:
            case "importance":
                weight = w.load(place, LANES) * (base.get() + v * v).root()
            case "mean":
                weight = base.get() + v.size()
            case "size":
                weight = v.size()
            case _:
                weight = v * v
        w.store(place, weight)
        total.set(total.get() + weight)

    each(x, count, put)
    fields.store(2 * LANES, total.get())


#: Weights by importance of sub-blocks of 32, which several families need.
weigh_32 = make_lanes(emit_weights, count=32, kind="importance")


@inlined
def put_half(value: Any, data: Any, at: int) -> Any:
    """Stores a float16 as two bytes and returns its float32."""
    half = to_half(value)
    data[at] = half & np.uint16(255)
    data[at + 1] = half >> np.uint16(8)
    return from_half(half)


@inlined
def nearest(value: Any) -> Any:
    """``nearest_int``: rounds to the nearest integer, ties to even."""
    return np.int64((value + np.float32(ROUNDER)) - np.float32(ROUNDER))


@inlined
def lay_out(values: Any, at: int, count: int, num_lanes: int, x: Any) -> None:
    """Lays consecutive sub-blocks side by side; missing ones are zeros."""
    for lane in range(num_lanes):
        for k in range(count):
            x[k * LANES + lane] = values[at + lane * count + k]
    for lane in range(num_lanes, LANES):
        for k in range(count):
            x[k * LANES + lane] = np.float32(0)


@inlined
def lay_out_importance(importance: Any, at: int, count: int, num_lanes: int, w: Any) -> None:
    """Lays the importance of the columns of sub-blocks side by side; that of missing ones is zero."""
    for lane in range(LANES):
        column = (at + lane * count) % importance.size
        for k in range(count):
            w[k * LANES + lane] = importance[column + k] if lane < num_lanes else np.float32(0)


@inlined
def sum_squares(values: Any, at: int, count: int) -> Any:
    """Returns sum of squares, sequentially in float32."""
    total = np.float32(0)
    for k in range(at, at + count):
        total += values[k] * values[k]
    return total


@inlined
def find_largest_scale(fields: Any) -> Any:
    """Returns the first scale of largest magnitude, with its sign; zero if all are zero."""
    size, value = np.float32(0), np.float32(0)
    for k in range(min(LANES, fields.size)):
        if abs(fields[k]) > size:
            size, value = abs(fields[k]), fields[k]
    return value


@inlined
def put_nibbles(codes: Any, lane: int, data: Any, at: int) -> None:
    """Stores 32 codes of four bits: the first 16 in the low halves of bytes, the others in the high halves."""
    for k in range(16):
        low, high = codes[k * LANES + lane], codes[(k + 16) * LANES + lane]
        data[at + k] = (low & np.uint8(15)) | (high << np.uint8(4))


@inlined
def put_pairs(codes: Any, data: Any, to: int) -> None:
    """Stores 256 codes of two bits, 16 sub-blocks of 16 side by side, in 64 bytes."""
    for half in range(2):
        for byte in range(32):
            pairs = np.uint8(0)
            for quarter in range(4):
                lane = 8 * half + 2 * quarter + byte // 16
                pairs |= (codes[(byte % 16) * LANES + lane] & np.uint8(3)) << np.uint8(2 * quarter)
            data[to + 32 * half + byte] = pairs


@inlined
def search_positive(values: Any, first: int, count: int, top: int, weights: Any, codes: Any) -> Any:
    """``make_qp_quants`` of ``values[first:]``, none of them negative: stores their codes and returns the scale."""
    largest = np.float32(0)
    for k in range(count):
        largest = max(largest, values[first + k])
    if largest < np.float32(TINIEST):
        for k in range(count):
            codes[k] = 0
        return np.float32(0)
    inverse = np.float32(top) / largest
    best = np.float32(0)
    for k in range(count):
        difference = values[first + k] - np.float32(1) / inverse * np.float32(nearest(inverse * values[first + k]))
        best += weights[k] * difference * difference
    for attempt in range(-4, 5):
        if attempt == 0:
            continue
        other = (np.float32(0.1) * np.float32(attempt) + np.float32(top)) / largest
        scale = np.float32(1) / other
        error = np.float32(0)
        for k in range(count):
            difference = values[first + k] - scale * np.float32(min(top, nearest(other * values[first + k])))
            error += weights[k] * difference * difference
        if error < best:
            best = error
            inverse = other
    sum_lx, sum_l2 = np.float32(0), np.float32(0)
    for k in range(count):
        codes[k] = min(top, nearest(inverse * values[first + k]))
        level, weight = np.float32(codes[k]), weights[k]
        sum_lx += weight * values[first + k] * level
        sum_l2 += weight * level * level
    for _ in range(5):
        changed = False
        for k in range(count):
            value, level, weight = values[first + k], np.float32(codes[k]), weights[k]
            rest_lx = sum_lx - weight * value * level
            rest_l2 = sum_l2 - weight * level * level
            if rest_lx > 0 and rest_l2 > 0:
                code = min(top, nearest(value * rest_l2 / rest_lx))
                if code != codes[k]:
                    rest_lx += weight * value * np.float32(code)
                    rest_l2 += weight * np.float32(code) * np.float32(code)
                    if rest_lx * rest_lx * sum_l2 > sum_lx * sum_lx * rest_l2:
                        codes[k], sum_lx, sum_l2, changed = code, rest_lx, rest_l2, True
        if not changed:
            break
    return sum_lx / sum_l2 if sum_l2 > 0 else np.float32(0)


@inlined
def weigh_by_block(
    values: Any, importance: Any, at: int, count: int, num_lanes: int, factor: Any, w: Any, fields: Any
) -> None:
    """Lays the importance side by side; field 0 becomes ``factor`` times the mean square of the block of 256."""
    lay_out_importance(importance, at, count, num_lanes, w)
    per_block = 256 // count
    for block in range(num_lanes // per_block):
        energy = np.float32(factor) * sum_squares(values, at + 256 * block, 256) / np.float32(256)
        for lane in range(per_block):
            fields[block * per_block + lane] = energy


@inlined
def find_scales_plain(fields: Any, first: int, count: int, top: int, row: int, levels: Any) -> Any:
    """Stores codes of scales, or of minima in another ``row``, relative to the largest; returns the step of a code."""
    largest = np.float32(0)
    for k in range(count):
        largest = max(largest, fields[row * LANES + first + k])
    inverse = np.float32(top) / largest if largest > 0 else np.float32(0)
    for k in range(count):
        levels[k] = min(top, nearest(inverse * fields[row * LANES + first + k]) & 255)
    return largest / np.float32(top)
