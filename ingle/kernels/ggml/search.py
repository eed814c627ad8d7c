"""ggml's searches for the scales of sub-blocks, sixteen side by side in vector registers.

Where ggml ends the search of a sub-block early, the search continues here without effect.

Source: ggml's ``ggml-quants.c`` (MIT license); docstrings name the corresponding functions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ingle.kernels.ggml.grids import LEVELS
from ingle.kernels.ggml.sub_blocks import LANES, TINIEST, each, find_largest, store_codes
from ingle.kernels.numba.vector import FLOAT, Array, Variable, Vector, fill, repeat, splat


def emit_affine(
    x: Array,
    w: Array,
    fields: Array,
    codes: Array,
    *,
    count: int,
    top: int,
    start: float = -0.9,
    step: float = 0.05,
    steps: int = 36,
    absolute: bool = False,
) -> None:
    """``make_qkx2_quants`` and ``make_qkx3_quants``: field 0 is the scale, field 1 the negated minimum."""
    builder = x.builder
    v, weight = x.load(0, LANES), w.load(0, LANES)
    low, high, sum_w, sum_x = (Variable(a) for a in (v, v, weight, weight * v))

    def look(place: Any) -> None:
        v, weight = x.load(place, LANES), w.load(place, LANES)
        low.set((v < low.get()).choose(v, low.get()))
        high.set((v > high.get()).choose(v, high.get()))
        sum_w.set(sum_w.get() + weight)
        sum_x.set(sum_x.get() + weight * v)

    each(x, count, look, first=1)
    low.set((low.get() > 0.0).choose(0.0, low.get()))
    flat = low.get().same(high.get())
    zero = fill(builder, 0.0, LANES)
    inverse = Variable(float(top) / (high.get() - low.get()))
    scale, base, best_inverse = Variable(1.0 / inverse.get()), Variable(low.get()), Variable(inverse.get())
    error, best = Variable(zero), Variable(zero)

    def code(v: Vector) -> Vector:
        return (inverse.get() * (v - low.get())).at_least(0.0).at_most(float(top)).round()

    def measure(factor: Vector, offset: Vector) -> None:
        error.set(zero)

        def add(place: Any) -> None:
            v = x.load(place, LANES)
            difference = factor * code(v) + offset - v
            difference = difference.size() if absolute else difference * difference
            error.set(error.get() + w.load(place, LANES) * difference)

        each(x, count, add)

    measure(scale.get(), low.get())
    best.set(error.get())
    sum_l, sum_l2, sum_xl = (Variable(zero) for _ in range(3))

    def attempt(index: Any) -> None:
        number = splat(builder, builder.sitofp(index, FLOAT), LANES)
        inverse.set(
            (fill(builder, start, LANES) + fill(builder, step, LANES) * number + float(top)) / (high.get() - low.get())
        )
        for variable in (sum_l, sum_l2, sum_xl):
            variable.set(zero)

        def add(place: Any) -> None:
            v = x.load(place, LANES)
            level = code(v)
            product = w.load(place, LANES) * level
            sum_l.set(sum_l.get() + product)
            sum_l2.set(sum_l2.get() + product * level)
            sum_xl.set(sum_xl.get() + product * v)

        each(x, count, add)
        determinant = sum_w.get() * sum_l2.get() - sum_l.get() * sum_l.get()
        factor = (sum_w.get() * sum_xl.get() - sum_x.get() * sum_l.get()) / determinant
        offset = (sum_l2.get() * sum_x.get() - sum_l.get() * sum_xl.get()) / determinant
        positive = offset > 0.0
        factor = positive.choose(sum_xl.get() / sum_l2.get(), factor)
        offset = positive.choose(0.0, offset)
        measure(factor, offset)
        better = (determinant > 0.0) & (error.get() < best.get())
        best.set(better.choose(error.get(), best.get()))
        scale.set(better.choose(factor, scale.get()))
        best_inverse.set(better.choose(inverse.get(), best_inverse.get()))
        base.set(better.choose(low.get(), base.get()))
        low.set(better.choose(offset, low.get()))

    repeat(builder, steps + 1, attempt)
    fields.store(0, flat.choose(0.0, scale.get()))
    fields.store(LANES, low.get() * -1.0)  # C negates: zero becomes minus zero
    low.set(base.get())
    inverse.set(best_inverse.get())
    each(x, count, lambda place: store_codes(codes, place, flat.choose(0.0, code(x.load(place, LANES)))))


def emit_symmetric(x: Array, w: Array, fields: Array, codes: Array, *, count: int, top: int) -> None:
    """``make_qx_quants``: field 0 is the scale; codes are from 0 to ``2 * top - 1``."""
    builder = x.builder
    zero = fill(builder, 0.0, LANES)
    size, value = find_largest(x, count)
    empty = size < TINIEST
    inverse = Variable(float(-top) / value)
    sum_lx, sum_l2 = Variable(zero), Variable(zero)

    def code(v: Vector) -> Vector:
        return (inverse.get() * v).at_least(float(-top)).at_most(float(top - 1)).round()

    def sum_up() -> None:
        sum_lx.set(zero)
        sum_l2.set(zero)

        def add(place: Any) -> None:
            v, weight = x.load(place, LANES), w.load(place, LANES)
            level = code(v)
            sum_lx.set(sum_lx.get() + weight * v * level)
            sum_l2.set(sum_l2.get() + weight * level * level)

        each(x, count, add)

    sum_up()
    ratio = sum_lx.get() / sum_l2.get()
    scale = Variable(sum_l2.get().same(0.0).choose(0.0, ratio))
    best, best_inverse = Variable(scale.get() * sum_lx.get()), Variable(inverse.get())

    def attempt(index: Any) -> None:
        after = builder.zext(builder.icmp_signed(">=", index, index.type(9)), index.type)  # number 0 is skipped
        number = builder.add(builder.sub(index, index.type(9)), after)
        factor = fill(builder, 0.1, LANES) * splat(builder, builder.sitofp(number, FLOAT), LANES) + float(top)
        inverse.set((factor * -1.0) / value)
        sum_up()
        product = sum_lx.get() * sum_lx.get()
        better = (sum_l2.get() > 0.0) & (product > best.get() * sum_l2.get())
        scale.set(better.choose(sum_lx.get() / sum_l2.get(), scale.get()))
        best.set(better.choose(scale.get() * sum_lx.get(), best.get()))
        best_inverse.set(better.choose(inverse.get(), best_inverse.get()))

    repeat(builder, 18, attempt)
    fields.store(0, empty.choose(0.0, scale.get()))
    inverse.set(best_inverse.get())
    each(
        x,
        count,
        lambda place: store_codes(codes, place, empty.choose(0.0, code(x.load(place, LANES)) + float(top))),
    )


def emit_descent(x: Array, w: Array, fields: Array, codes: Array, *, count: int, top: int) -> None:
    """``make_q3_quants``: field 0 is the scale; ``w`` is used for the codes as floats."""
    builder = x.builder
    zero = fill(builder, 0.0, LANES)
    size, value = find_largest(x, count)
    empty = size < TINIEST
    inverse = float(-top) / value
    sum_lx, sum_l2 = Variable(zero), Variable(zero)

    def clamp(v: Vector) -> Vector:
        return v.at_least(float(-top)).at_most(float(top - 1)).round()

    def begin(place: Any) -> None:
        v = x.load(place, LANES)
        level, weight = clamp(inverse * v), v * v
        w.store(place, level)
        sum_lx.set(sum_lx.get() + weight * v * level)
        sum_l2.set(sum_l2.get() + weight * level * level)

    each(x, count, begin)

    def descend(place: Any) -> None:
        v, level = x.load(place, LANES), w.load(place, LANES)
        weight = v * v
        rest_lx = sum_lx.get() - weight * v * level
        rest_l2 = sum_l2.get() - weight * level * level
        other = clamp(v * rest_l2 / rest_lx)
        new_lx, new_l2 = rest_lx + weight * v * other, rest_l2 + weight * other * other
        differs = (other < level) | (other > level)
        gain = new_lx * new_lx * sum_l2.get() > sum_lx.get() * sum_lx.get() * new_l2
        better = (rest_lx > 0.0) & differs & (new_l2 > 0.0) & gain
        w.store(place, better.choose(other, level))
        sum_lx.set(better.choose(new_lx, sum_lx.get()))
        sum_l2.set(better.choose(new_l2, sum_l2.get()))

    repeat(builder, 5, lambda _: each(x, count, descend))
    scale = (sum_l2.get() > 0.0).choose(sum_lx.get() / sum_l2.get(), zero)
    fields.store(0, empty.choose(0.0, scale))
    each(x, count, lambda place: store_codes(codes, place, empty.choose(0.0, w.load(place, LANES) + float(top))))


def find_level(v: Vector) -> tuple[Vector, Vector]:
    """``best_index_int8``: returns index and value of the nearest non-linear level; ties go to the upper one.

    Comparing with the midpoints between levels is equivalent, because both differences are exact there.
    """
    index, level = v.of(0.0), v.of(float(LEVELS[0]))
    for low, high in pairwise(LEVELS):
        reached = v >= (low + high) / 2
        index = index + reached.choose(1.0, v.of(0.0))
        level = level + reached.choose(float(high - low), v.of(0.0))
    return index, level


def emit_levels(x: Array, w: Array, fields: Array, codes: Array, *, count: int, tries: int) -> None:
    """The search in ``quantize_row_iq4_nl_impl``: field 0 is the scale."""
    builder = x.builder
    zero = fill(builder, 0.0, LANES)
    size, value = find_largest(x, count)
    sum_lx, sum_l2, inverse = Variable(zero), Variable(zero), Variable(zero)

    def sum_up() -> None:
        sum_lx.set(zero)
        sum_l2.set(zero)

        def add(place: Any) -> None:
            v = x.load(place, LANES)
            _, level = find_level(inverse.get() * v)
            product = w.load(place, LANES) * level
            sum_lx.set(sum_lx.get() + product * v)
            sum_l2.set(sum_l2.get() + product * level)

        each(x, count, add)

    inverse.set(1.0 / ((value * -1.0) / float(LEVELS[0])))
    sum_up()
    scale = Variable((sum_l2.get() > 0.0).choose(sum_lx.get() / sum_l2.get(), zero))
    best = Variable(scale.get() * sum_lx.get())

    def attempt(index: Any) -> None:
        number = builder.add(index, index.type(LEVELS[0] - tries))
        inverse.set(splat(builder, builder.sitofp(number, FLOAT), LANES) / value)
        sum_up()
        better = (sum_l2.get() > 0.0) & (sum_lx.get() * sum_lx.get() > best.get() * sum_l2.get())
        scale.set(better.choose(sum_lx.get() / sum_l2.get(), scale.get()))
        best.set(better.choose(scale.get() * sum_lx.get(), best.get()))

    repeat(builder, 2 * tries + 1, attempt)
    fields.store(0, (size < TINIEST).choose(0.0, scale.get()))


def emit_nearest(x: Array, w: Array, fields: Array, codes: Array, *, count: int) -> None:
    """Sets codes to those of the levels nearest to ``x * field 0``."""
    inverse = fields.load(0, LANES)
    each(x, count, lambda place: store_codes(codes, place, find_level(inverse * x.load(place, LANES))[0]))
