"""Search for HQQ's scale and zero, for sixteen groups of weights side by side in vector registers.

The published solver optimizes only the zero. Here both are free: for fixed codes ``q``, the best grid ``s * q + m`` is
a weighted linear regression of the weights on their codes. The variance that it explains has a closed form, so one pass
over a group evaluates one assignment of codes. The first passes start from grids that exclude a share of the range at
either end or extend it, in all combinations; further passes refine the best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from ingle.kernels.ggml.sub_blocks import LANES, store_codes
from ingle.kernels.numba.vector import ARRAY, FLOAT, Array, Variable, Vector, fill, make_intrinsic, repeat, splat

#: Passes that refine the best start.
REFINEMENTS = 3


def each(x: Array, count: Any, body: Callable[[Any], None]) -> None:
    """Emits a loop over ``count`` elements of groups; ``body`` gets the index in ``x`` of an element of all sixteen."""
    repeat(x.builder, count, lambda index: body(x.builder.mul(index, index.type(LANES))))


def emit_fit(x: Array, w: Array, fields: Array, count: Any, top: Any, first: Any, step: Any, starts: Any) -> None:
    """Finds the grid with the smallest weighted square error, before anything is rounded.

    Centers ``x`` on its weighted mean. The rows of ``fields`` become: 0 the scale, 1 the mean of the codes, 2 the mean
    of the weights, 3 the lowest and 4 the highest weight whose error has a weight above zero.
    """
    builder = x.builder
    zero = fill(builder, 0.0, LANES)
    highest_code = splat(builder, top, LANES)
    low, high = Variable(fill(builder, float("inf"), LANES)), Variable(fill(builder, -float("inf"), LANES))
    sum_w, sum_x = Variable(zero), Variable(zero)

    def look(place: Any) -> None:
        v, weight = x.load(place, LANES), w.load(place, LANES)
        counts = weight > 0.0
        low.set((counts & (v < low.get())).choose(v, low.get()))
        high.set((counts & (v > high.get())).choose(v, high.get()))
        sum_w.set(sum_w.get() + weight)
        sum_x.set(sum_x.get() + weight * v)

    each(x, count, look)
    total, mean = sum_w.get(), sum_x.get() / sum_w.get()
    each(x, count, lambda place: x.store(place, x.load(place, LANES) - mean))
    middle = highest_code * 0.5
    spread = high.get() - low.get()
    scale, center, best = Variable(spread / highest_code), Variable(zero), Variable(fill(builder, -1.0, LANES))
    sum_q, sum_qq, sum_qx = (Variable(zero) for _ in range(3))

    def attempt(size: Vector, base: Vector) -> None:
        """Assigns codes by the grid that begins at ``base``; keeps the regression on them if it explains more."""
        inverse = 1.0 / size
        for variable in (sum_q, sum_qq, sum_qx):
            variable.set(zero)

        def add(place: Any) -> None:
            v = x.load(place, LANES)
            code = ((v - base) * inverse).at_least(0.0).at_most(highest_code).round() - middle
            product = w.load(place, LANES) * code
            sum_q.set(sum_q.get() + product)
            sum_qq.set(sum_qq.get() + product * code)
            sum_qx.set(sum_qx.get() + product * v)

        each(x, count, add)
        mean_q = sum_q.get() / total
        variance = sum_qq.get() - sum_q.get() * mean_q
        factor = sum_qx.get() / variance
        explained = sum_qx.get() * factor
        better = (variance > 0.0) & (explained > best.get())
        best.set(better.choose(explained, best.get()))
        scale.set(better.choose(factor, scale.get()))
        center.set(better.choose(mean_q, center.get()))

    def trim(index: Any) -> Vector:
        share = builder.fadd(first, builder.fmul(builder.sitofp(index, FLOAT), step))
        return splat(builder, share, LANES) * spread

    def start(i: Any) -> None:
        base = low.get() - mean + trim(i)
        repeat(builder, starts, lambda j: attempt((high.get() - mean - trim(j) - base) / highest_code, base))

    repeat(builder, starts, start)
    repeat(builder, REFINEMENTS, lambda _: attempt(scale.get(), zero - scale.get() * (center.get() + middle)))
    found = (scale.get(), center.get() + middle, mean, low.get(), high.get())
    for row, vector in enumerate(found):
        fields.store(LANES * row, vector)


def emit_measure(x: Array, w: Array, fields: Array, count: Any, top: Any) -> None:
    """Row 2 of ``fields`` becomes the weighted square error on the grid ``(q - row 1) * row 0``."""
    builder = x.builder
    scale, offset = fields.load(0, LANES), fields.load(LANES, LANES)
    error = Variable(fill(builder, 0.0, LANES))

    def add(place: Any) -> None:
        v = x.load(place, LANES)
        difference = (nearest(v, 1.0 / scale, offset, top) - offset) * scale - v
        error.set(error.get() + w.load(place, LANES) * difference * difference)

    each(x, count, add)
    fields.store(2 * LANES, error.get())


def emit_codes(x: Array, codes: Array, fields: Array, count: Any, top: Any) -> None:
    """Stores the codes of the nearest points on the grid ``(q - row 1) * row 0`` of ``fields``."""
    scale, offset = fields.load(0, LANES), fields.load(LANES, LANES)
    each(x, count, lambda place: store_codes(codes, place, nearest(x.load(place, LANES), 1.0 / scale, offset, top)))


def nearest(v: Vector, inverse: Vector, offset: Vector, top: Any) -> Vector:
    """Returns codes of weights on a grid, as floats."""
    return (v * inverse + offset).at_least(0.0).at_most(splat(v.builder, top, LANES)).round()


_FIT = (ARRAY, ARRAY, ARRAY, types.int64, types.float32, types.float32, types.float32, types.int64)
_GRID = (ARRAY, ARRAY, ARRAY, types.int64, types.float32)
#: The functions for kernels.
fit = make_intrinsic(emit_fit, _FIT)
measure = make_intrinsic(emit_measure, _GRID)
assign = make_intrinsic(emit_codes, _GRID)
