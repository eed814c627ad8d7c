"""Packing weights into GGUF's block formats on the CPU, byte for byte as ggml's reference does.

ggml searches the scales of a block with sums whose order decides the last bits, so nothing here is reordered.  Speed
comes from sixteen sub-blocks that lie side by side in vector registers: element ``k`` of all sixteen, then ``k + 1``.
A search that ggml ends early for one sub-block goes on here and changes nothing.

Arrays of a kernel: ``values`` float32, flat, whole rows; ``importance`` float32, of one row, or
empty; ``data`` uint8, flat, written.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from ingle.kernels.cpu import float_bits
from ingle.kernels.cpu_cache import compile_kernel
from ingle.kernels.cpu_encode import from_bits
from ingle.kernels.ggml_decode import LEVELS
from ingle.kernels.vector import BYTE, FLOAT, Array, Variable, Vector, fill, repeat, splat

#: Sub-blocks side by side.
LANES = 16
#: Below this a block counts as zero.
TINIEST = 1e-15
#: ``(v + ROUND) - ROUND`` rounds half to even.
ROUND = np.float32(12582912.0)


def make_lanes(write: Callable[..., None], **options: Any) -> Any:
    """A function for kernels, ``f(x, w, fields, codes)``, from one that writes its code.

    ``x`` and ``w`` hold values and weights of 16 sub-blocks side by side, ``fields`` rows of 16 float32 about them,
    ``codes`` their codes as uint8.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def lanes(_: Any, x: Any, w: Any, fields: Any, codes: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = zip(signature.args, arguments, strict=True)
            write(*(Array(context, builder, kind, value) for kind, value in pairs), **options)
            return context.get_dummy_value()

        return types.void(x, w, fields, codes), generate

    return lanes


def each(x: Array, count: int, body: Callable[[Any], None], *, first: int = 0) -> None:
    """A loop over the elements of sub-blocks: ``body`` gets the place of the sixteen in ``x``."""

    def step(index: Any) -> None:
        body(x.builder.add(x.builder.mul(index, index.type(LANES)), index.type(LANES * first)))

    repeat(x.builder, count - first, step)


def store_codes(codes: Array, place: Any, values: Vector) -> None:
    """Writes whole numbers as bytes."""
    codes.store(place, values.to_int().narrow(BYTE))


def write_extremes(x: Array, w: Array, fields: Array, codes: Array, *, count: int) -> None:
    """Fields: 0 the value of largest size, the first of several, with its sign; 1 the lowest; 2 the highest."""
    start = x.load(0, LANES)
    size, value, low, high = (Variable(v) for v in (start.size(), start, start, start))

    def look(place: Any) -> None:
        v = x.load(place, LANES)
        larger = v.size() > size.get()
        size.set(larger.choose(v.size(), size.get()))
        value.set(larger.choose(v, value.get()))
        low.set((v < low.get()).choose(v, low.get()))
        high.set((v > high.get()).choose(v, high.get()))

    each(x, count, look, first=1)
    for row, variable in enumerate((value, low, high)):
        fields.store(LANES * row, variable.get())


def write_steps(x: Array, w: Array, fields: Array, codes: Array, *, count: int, bias: float, top: int) -> None:
    """Codes ``trunc((x - fields[1]) * fields[0] + bias)``, at most ``top``."""
    inverse, low = fields.load(0, LANES), fields.load(LANES, LANES)

    def put(place: Any) -> None:
        v = (x.load(place, LANES) - low) * inverse + bias
        store_codes(codes, place, v.at_least(0.0).at_most(float(top)))

    each(x, count, put)


def write_rounds(x: Array, w: Array, fields: Array, codes: Array, *, count: int, limit: int, bias: int) -> None:
    """Codes ``roundf(x * fields[0]) + bias``: half away from zero; before the bias at most ``limit`` in size."""
    inverse = fields.load(0, LANES)

    def put(place: Any) -> None:
        v = (x.load(place, LANES) * inverse).at_least(float(-limit)).at_most(float(limit))
        whole = v.truncate()
        away = ((v - whole).size() >= 0.5).choose(1.0, fill(x.builder, 0.0, LANES))
        store_codes(codes, place, (v < 0.0).choose(whole - away, whole + away) + float(bias))

    each(x, count, put)


def write_affine(
    x: Array,
    w: Array,
    fields: Array,
    codes: Array,
    *,
    count: int,
    top: int,
    start: float,
    step: float,
    steps: int,
    absolute: bool = False,
) -> None:
    """``make_qkx2_quants`` and ``make_qkx3_quants``: fields 0 scale and 1 minus the minimum, and codes."""
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


def write_symmetric(x: Array, w: Array, fields: Array, codes: Array, *, count: int, top: int) -> None:
    """``make_qx_quants``: field 0 the scale, and codes from 0 to ``2 * top - 1``."""
    builder = x.builder
    zero = fill(builder, 0.0, LANES)
    size, value = Variable(zero), Variable(zero)

    def look(place: Any) -> None:
        v = x.load(place, LANES)
        larger = v.size() > size.get()
        size.set(larger.choose(v.size(), size.get()))
        value.set(larger.choose(v, value.get()))

    each(x, count, look)
    empty = size.get() < TINIEST
    inverse = Variable(float(-top) / value.get())
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
        after = builder.zext(builder.icmp_signed(">=", index, index.type(9)), index.type)  # there is no number 0
        number = builder.add(builder.sub(index, index.type(9)), after)
        factor = fill(builder, 0.1, LANES) * splat(builder, builder.sitofp(number, FLOAT), LANES) + float(top)
        inverse.set((factor * -1.0) / value.get())
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


def write_descent(x: Array, w: Array, fields: Array, codes: Array, *, count: int, top: int) -> None:
    """``make_q3_quants``: field 0 the scale, and codes; ``w`` is used for the codes as floats."""
    builder = x.builder
    zero = fill(builder, 0.0, LANES)
    size, value = Variable(zero), Variable(zero)

    def look(place: Any) -> None:
        v = x.load(place, LANES)
        larger = v.size() > size.get()
        size.set(larger.choose(v.size(), size.get()))
        value.set(larger.choose(v, value.get()))

    each(x, count, look)
    empty = size.get() < TINIEST
    inverse = float(-top) / value.get()
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


def write_again(x: Array, w: Array, fields: Array, codes: Array, *, count: int, low: int, high: int) -> None:
    """Codes ``(x + fields[1]) / fields[0]`` from 0 at ``low``; they stay where the scale is zero."""
    scale, offset = fields.load(0, LANES), fields.load(LANES, LANES)
    nothing = scale.same(0.0)

    def put(place: Any) -> None:
        v = ((x.load(place, LANES) + offset) / scale).at_least(float(low)).at_most(float(high)).round()
        fresh = (v - float(low)).to_int().narrow(BYTE)
        codes.store(place, nothing.choose(codes.load(place, LANES), fresh))

    each(x, count, put)


def write_weights(x: Array, w: Array, fields: Array, codes: Array, *, count: int, kind: str) -> None:
    """Weights of the errors in ``w``, and their sums in field 2.

    ``importance``: those in ``w`` times ``sqrt(fields[0] + x^2)``; ``given``: those in ``w``; ``size``: ``|x|``;
    ``mean``: the root of the mean square plus ``|x|``; ``square``: ``x^2``.
    """
    builder = x.builder
    base, total = Variable(fields.load(0, LANES)), Variable(fill(builder, 0.0, LANES))
    if kind == "mean":

        def add(place: Any) -> None:
            v = x.load(place, LANES)
            total.set(total.get() + v * v)

        each(x, count, add)
        base.set((total.get() / float(count)).root())
        total.set(fill(builder, 0.0, LANES))

    def put(place: Any) -> None:
        v = x.load(place, LANES)
        match kind:
            case "importance":
                weight = w.load(place, LANES) * (base.get() + v * v).root()
            case "given":
                weight = w.load(place, LANES)
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


def find_level(v: Vector) -> tuple[Vector, Vector]:
    """``best_index_int8`` of the non-linear levels: index and level of the nearest, the upper one of two as near.

    Around the middle of two levels both differences are exact, so that comparing with the middle is the same.
    """
    index, level = v.of(0.0), v.of(float(LEVELS[0]))
    for low, high in pairwise(LEVELS):
        reached = v >= (low + high) / 2
        index = index + reached.choose(1.0, v.of(0.0))
        level = level + reached.choose(float(high - low), v.of(0.0))
    return index, level


def write_levels(x: Array, w: Array, fields: Array, codes: Array, *, count: int, tries: int) -> None:
    """The search of ``quantize_row_iq4_nl_impl``: field 0 the scale."""
    builder = x.builder
    zero = fill(builder, 0.0, LANES)
    size, value = Variable(zero), Variable(zero)

    def look(place: Any) -> None:
        v = x.load(place, LANES)
        larger = v.size() > size.get()
        size.set(larger.choose(v.size(), size.get()))
        value.set(larger.choose(v, value.get()))

    each(x, count, look)
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

    inverse.set(1.0 / ((value.get() * -1.0) / float(LEVELS[0])))
    sum_up()
    scale = Variable((sum_l2.get() > 0.0).choose(sum_lx.get() / sum_l2.get(), zero))
    best = Variable(scale.get() * sum_lx.get())

    def attempt(index: Any) -> None:
        number = builder.add(index, index.type(LEVELS[0] - tries))
        inverse.set(splat(builder, builder.sitofp(number, FLOAT), LANES) / value.get())
        sum_up()
        better = (sum_l2.get() > 0.0) & (sum_lx.get() * sum_lx.get() > best.get() * sum_l2.get())
        scale.set(better.choose(sum_lx.get() / sum_l2.get(), scale.get()))
        best.set(better.choose(scale.get() * sum_lx.get(), best.get()))

    repeat(builder, 2 * tries + 1, attempt)
    fields.store(0, (size.get() < TINIEST).choose(0.0, scale.get()))


def write_nearest(x: Array, w: Array, fields: Array, codes: Array, *, count: int) -> None:
    """Codes of the levels nearest to ``x * fields[0]``."""
    inverse = fields.load(0, LANES)
    each(x, count, lambda place: store_codes(codes, place, find_level(inverse * x.load(place, LANES))[0]))


#: The intrinsics of sub-blocks of 16 and 32.
extremes_32 = make_lanes(write_extremes, count=32)
extremes_256 = make_lanes(write_extremes, count=256)
steps_q4 = make_lanes(write_steps, count=32, bias=8.5, top=15)
steps_q4_low = make_lanes(write_steps, count=32, bias=0.5, top=15)
steps_q5 = make_lanes(write_steps, count=32, bias=16.5, top=31)
steps_q5_low = make_lanes(write_steps, count=32, bias=0.5, top=31)
rounds_q8 = make_lanes(write_rounds, count=32, limit=127, bias=0)
weigh_32 = make_lanes(write_weights, count=32, kind="importance")
symmetric_q4 = make_lanes(write_symmetric, count=32, top=8)
symmetric_q5 = make_lanes(write_symmetric, count=32, top=16)
affine_q4 = make_lanes(write_affine, count=32, top=15, start=-0.9, step=0.05, steps=36)
affine_q5 = make_lanes(write_affine, count=32, top=31, start=-0.9, step=0.05, steps=36)
affine_q2 = make_lanes(write_affine, count=16, top=3, start=-0.9, step=0.05, steps=36)
affine_q4_plain = make_lanes(write_affine, count=32, top=15, start=-1.0, step=0.1, steps=20)
affine_q5_plain = make_lanes(write_affine, count=32, top=31, start=-0.5, step=0.1, steps=15)
affine_q2_plain = make_lanes(write_affine, count=16, top=3, start=-0.5, step=0.1, steps=15, absolute=True)
symmetric_q6 = make_lanes(write_symmetric, count=16, top=32)
symmetric_q3 = make_lanes(write_symmetric, count=16, top=4)
symmetric_scales = make_lanes(write_symmetric, count=16, top=32)
descend_q3 = make_lanes(write_descent, count=16, top=4)
weigh_mean = make_lanes(write_weights, count=32, kind="mean")
weigh_size = make_lanes(write_weights, count=16, kind="size")
weigh_square = make_lanes(write_weights, count=16, kind="square")
weigh_given = make_lanes(write_weights, count=16, kind="given")
weigh_16 = make_lanes(write_weights, count=16, kind="importance")
again_q4 = make_lanes(write_again, count=32, low=0, high=15)
again_q5 = make_lanes(write_again, count=32, low=0, high=31)
again_q2 = make_lanes(write_again, count=16, low=0, high=3)
again_q3 = make_lanes(write_again, count=16, low=-4, high=3)
levels_32 = make_lanes(write_levels, count=32, tries=7)
nearest_32 = make_lanes(write_nearest, count=32)
weigh_square_32 = make_lanes(write_weights, count=32, kind="square")
rounds_trits = make_lanes(write_rounds, count=256, limit=1, bias=1)
again_q6 = make_lanes(write_again, count=16, low=-32, high=31)


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
def sum_squares(values: Any, at: int, count: int) -> Any:
    """Their sum, one after the other in float32."""
    total = np.float32(0)
    for k in range(at, at + count):
        total += values[k] * values[k]
    return total


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def lay_out_importance(importance: Any, at: int, count: int, num_lanes: int, w: Any) -> None:
    """The importance of the columns of sub-blocks side by side; of missing ones zero."""
    for lane in range(LANES):
        column = (at + lane * count) % importance.size
        for k in range(count):
            w[k * LANES + lane] = importance[column + k] if lane < num_lanes else np.float32(0)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def weigh_by_row(
    values: Any, importance: Any, at: int, num_lanes: int, known: Any, x: Any, w: Any, fields: Any, codes: Any
) -> None:
    """Weights of 16 blocks of 32 by importance and the mean square of their row; ``known`` is a row and its mean."""
    lay_out_importance(importance, at, 32, num_lanes, w)
    num_columns = importance.size
    for lane in range(num_lanes):
        row = (at + 32 * lane) // num_columns
        if known[0] != row:
            known[0] = row
            known[1] = sum_squares(values, row * num_columns, num_columns) / np.float32(num_columns)
        fields[lane] = known[1]
    weigh_32(x, w, fields, codes)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_nibbles(codes: Any, lane: int, data: Any, at: int) -> None:
    """Packs 32 codes of four bits: the first 16 in low halves of bytes, the others in high ones."""
    for k in range(16):
        low, high = codes[k * LANES + lane], codes[(k + 16) * LANES + lane]
        data[at + k] = (low & np.uint8(15)) | (high << np.uint8(4))


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_fifth_bits(codes: Any, lane: int, data: Any, at: int) -> None:
    """Packs the fifth bits of 32 codes into four bytes."""
    for byte in range(4):
        bits = np.uint8(0)
        for k in range(8):
            bits |= ((codes[(8 * byte + k) * LANES + lane] >> np.uint8(4)) & np.uint8(1)) << np.uint8(k)
        data[at + byte] = bits


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def invert_symmetric(fields: Any, parts: Any) -> None:
    """``d = largest / -parts``: fields 0 becomes its inverse, 1 zero, 2 keeps d."""
    for lane in range(LANES):
        scale = fields[lane] / np.float32(-parts)
        fields[lane] = np.float32(1) / scale if scale != 0 else np.float32(0)
        fields[LANES + lane] = np.float32(0)
        fields[2 * LANES + lane] = scale


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def invert_size(fields: Any, parts: Any) -> None:
    """``d = |largest| / parts``: fields 0 becomes its inverse, 2 becomes d."""
    for lane in range(LANES):
        scale = abs(fields[lane]) / np.float32(parts)
        fields[lane] = np.float32(1) / scale if scale != 0 else np.float32(0)
        fields[2 * LANES + lane] = scale


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def invert_affine(fields: Any, parts: Any) -> None:
    """``d = (highest - lowest) / parts``: fields 0 becomes its inverse, 1 stays the lowest, 2 becomes d."""
    for lane in range(LANES):
        scale = (fields[2 * LANES + lane] - fields[LANES + lane]) / np.float32(parts)
        fields[lane] = np.float32(1) / scale if scale != 0 else np.float32(0)
        fields[2 * LANES + lane] = scale


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def take_found(fields: Any) -> None:
    """After a search: field 2 becomes the scale, 1 the minimum."""
    for lane in range(LANES):
        fields[2 * LANES + lane] = fields[lane]
        fields[LANES + lane] = -fields[LANES + lane]


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q4_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_0_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            symmetric_q4(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_symmetric(fields, 8)
            steps_q4(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 18
            put_half(fields[2 * LANES + lane], data, to)
            put_nibbles(codes, lane, data, to + 2)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q4_1(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_1_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            affine_q4(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_affine(fields, 15)
            steps_q4_low(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 20
            put_half(fields[2 * LANES + lane], data, to)
            put_half(fields[LANES + lane], data, to + 2)
            put_nibbles(codes, lane, data, to + 4)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q5_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_0_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            symmetric_q5(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_symmetric(fields, 16)
            steps_q5(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 22
            put_half(fields[2 * LANES + lane], data, to)
            put_fifth_bits(codes, lane, data, to + 2)
            put_nibbles(codes, lane, data, to + 6)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q5_1(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_1_ref``, or ``_impl`` with importance: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, known = np.zeros(3 * LANES, np.float32), np.full(2, -1.0)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_row(values, importance, at, num_lanes, known, x, w, fields, codes)
            affine_q5(x, w, fields, codes)
            take_found(fields)
        else:
            extremes_32(x, w, fields, codes)
            invert_affine(fields, 31)
            steps_q5_low(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 24
            put_half(fields[2 * LANES + lane], data, to)
            put_half(fields[LANES + lane], data, to + 2)
            put_fifth_bits(codes, lane, data, to + 4)
            put_nibbles(codes, lane, data, to + 8)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q8_0(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q8_0_ref``: groups of 16 blocks; importance is not used."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(0, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        extremes_32(x, w, fields, codes)
        invert_size(fields, 127)
        rounds_q8(x, w, fields, codes)
        for lane in range(num_lanes):
            to = (group * LANES + lane) * 34
            put_half(fields[2 * LANES + lane], data, to)
            for k in range(32):
                data[to + 2 + k] = codes[k * LANES + lane]


@compile_kernel
def encode_q4_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q4_0(values, importance, data, first, stop)


@compile_kernel
def encode_q4_1(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_1; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q4_1(values, importance, data, first, stop)


@compile_kernel
def encode_q5_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q5_0(values, importance, data, first, stop)


@compile_kernel
def encode_q5_1(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_1; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q5_1(values, importance, data, first, stop)


@compile_kernel
def encode_q8_0(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q8_0; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q8_0(values, importance, data, first, stop)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def nearest(value: Any) -> Any:
    """``nearest_int``: half to even."""
    return np.int64((value + ROUND) - ROUND)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def search_positive(values: Any, first: int, count: int, top: int, weights: Any, codes: Any) -> Any:
    """``make_qp_quants`` of ``values[first:]``, none of them negative: their codes, and the scale."""
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


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def weigh_by_block(
    values: Any, importance: Any, at: int, count: int, num_lanes: int, factor: Any, w: Any, fields: Any
) -> None:
    """Importance side by side, and in field 0 the mean square of the block of 256 times ``factor``."""
    lay_out_importance(importance, at, count, num_lanes, w)
    per_block = 256 // count
    for block in range(num_lanes // per_block):
        energy = np.float32(factor) * sum_squares(values, at + 256 * block, 256) / np.float32(256)
        for lane in range(per_block):
            fields[block * per_block + lane] = energy


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def find_scales_plain(fields: Any, first: int, count: int, top: int, row: int, levels: Any) -> Any:
    """Codes of scales (or minima, in another ``row``) by their largest, and what one code is worth."""
    largest = np.float32(0)
    for k in range(count):
        largest = max(largest, fields[row * LANES + first + k])
    inverse = np.float32(top) / largest if largest > 0 else np.float32(0)
    for k in range(count):
        levels[k] = min(top, nearest(inverse * fields[row * LANES + first + k]) & 255)
    return largest / np.float32(top)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def put_scales_and_mins(fields: Any, block: int, weighted: bool, levels: Any, lows: Any, data: Any, to: int) -> None:
    """The scales of one Q4_K or Q5_K block: 16 bytes; fields 0 and 1 become what its codes are relative to."""
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


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q4_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q4_K_ref``, or ``_impl`` with importance: groups of two blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(8, np.int64), np.zeros(8, np.int64)
    for group in range(first, stop):
        at = group * 512
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_block(values, importance, at, 32, num_lanes, 2, w, fields)
            weigh_32(x, w, fields, codes)
            affine_q4(x, w, fields, codes)
        else:
            weigh_mean(x, w, fields, codes)
            affine_q4_plain(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 144
            put_scales_and_mins(fields, block, importance.size > 0, levels, lows, data, to)
        again_q4(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 144
            for k in range(128):
                pair, byte = k // 32, k % 32
                lane = 8 * block + 2 * pair
                data[to + 16 + k] = codes[byte * LANES + lane] | codes[byte * LANES + lane + 1] << np.uint8(4)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q5_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q5_K_ref``, or ``_impl`` with importance: groups of two blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(8, np.int64), np.zeros(8, np.int64)
    for group in range(first, stop):
        at = group * 512
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        if importance.size:
            weigh_by_block(values, importance, at, 32, num_lanes, 2, w, fields)
            weigh_32(x, w, fields, codes)
            affine_q5(x, w, fields, codes)
        else:
            weigh_mean(x, w, fields, codes)
            affine_q5_plain(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 176
            put_scales_and_mins(fields, block, importance.size > 0, levels, lows, data, to)
        again_q5(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 176
            for byte in range(32):
                high = np.uint8(0)
                for lane in range(8):
                    high |= (codes[byte * LANES + 8 * block + lane] >> np.uint8(4)) << np.uint8(lane)
                data[to + 16 + byte] = high
                for pair in range(4):
                    lane = 8 * block + 2 * pair
                    low = codes[byte * LANES + lane] & np.uint8(15)
                    data[to + 48 + 32 * pair + byte] = low | codes[byte * LANES + lane + 1] << np.uint8(4)


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


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q2_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q2_K_ref``, or ``_impl`` with importance: one block a group."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields, levels, lows = np.zeros(3 * LANES, np.float32), np.zeros(16, np.int64), np.zeros(16, np.int64)
    for block in range(first, stop):
        at, to = 256 * block, 84 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            weigh_by_block(values, importance, at, 16, LANES, 1, w, fields)
            weigh_16(x, w, fields, codes)
            affine_q2(x, w, fields, codes)
            weights = fields[2 * LANES :]
            scale = search_positive(fields, 0, 16, 15, weights, levels)
            minimum = search_positive(fields, LANES, 16, 15, weights, lows)
        else:
            weigh_size(x, w, fields, codes)
            affine_q2_plain(x, w, fields, codes)
            scale = find_scales_plain(fields, 0, 16, 15, 0, levels)
            minimum = find_scales_plain(fields, 0, 16, 15, 1, lows)
        scale, minimum = put_half(scale, data, to + 80), put_half(minimum, data, to + 82)
        for k in range(16):
            data[to + k] = levels[k] | lows[k] << 4
            fields[k] = scale * np.float32(levels[k])
            fields[LANES + k] = minimum * np.float32(lows[k])
        again_q2(x, w, fields, codes)
        put_pairs(codes, data, to + 16)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def find_largest_scale(fields: Any) -> Any:
    """The scale of largest size, the first of several, with its sign; zero where all are."""
    size, value = np.float32(0), np.float32(0)
    for k in range(min(LANES, fields.size)):
        if abs(fields[k]) > size:
            size, value = abs(fields[k]), fields[k]
    return value


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q3_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q3_K_ref``, or ``_impl`` with importance: one block a group."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields, levels = np.zeros(3 * LANES, np.float32), np.zeros(16, np.int64)
    # The scales of a block as the first of 16 sub-blocks side by side, for the same search.
    scales, weights = np.zeros(16 * LANES, np.float32), np.zeros(16 * LANES, np.float32)
    found, chosen = np.zeros(3 * LANES, np.float32), np.zeros(16 * LANES, np.uint8)
    for block in range(first, stop):
        at, to = 256 * block, 110 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            weigh_by_block(values, importance, at, 16, LANES, 2, w, fields)
            weigh_16(x, w, fields, codes)
            symmetric_q3(x, w, fields, codes)
            for k in range(16):
                scales[k * LANES], weights[k * LANES] = fields[k], fields[2 * LANES + k]
            symmetric_scales(scales, weights, found, chosen)
            scale = found[0]
            for k in range(16):
                levels[k] = chosen[k * LANES]
        else:
            descend_q3(x, w, fields, codes)
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


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_q6_k(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_row_q6_K_ref``, or ``_impl`` with importance: one block a group."""
    x, w, codes = np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.float32), np.empty(16 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for block in range(first, stop):
        at, to = 256 * block, 210 * block
        lay_out(values, at, 16, LANES, x)
        if importance.size:
            lay_out_importance(importance, at, 16, LANES, w)
        else:
            weigh_square(x, w, fields, codes)
        symmetric_q6(x, w, fields, codes)
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


@compile_kernel
def encode_q4_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q4_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q4_k(values, importance, data, first, stop)


@compile_kernel
def encode_q6_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q6_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q6_k(values, importance, data, first, stop)


@compile_kernel
def encode_q5_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q5_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_q5_k(values, importance, data, first, stop)


@compile_kernel
def encode_q3_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q3_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q3_k(values, importance, data, first, stop)


@compile_kernel
def encode_q2_k(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs Q2_K; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 256), num_chunks)
        pack_q2_k(values, importance, data, first, stop)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def weigh_levels(
    values: Any, importance: Any, at: int, size: int, num_lanes: int, x: Any, w: Any, fields: Any, codes: Any
) -> None:
    """Weights of 16 sub-blocks of 32 as the non-linear formats have them: by importance and block of ``size``."""
    if importance.size:
        lay_out_importance(importance, at, 32, num_lanes, w)
        for block in range(num_lanes * 32 // size):
            energy = sum_squares(values, at + size * block, size) * (np.float32(2) / np.float32(size))
            for lane in range(size // 32):
                fields[block * (size // 32) + lane] = energy
        weigh_32(x, w, fields, codes)
    else:
        weigh_square_32(x, w, fields, codes)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_iq4_nl(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_iq4_nl``: groups of 16 blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 32 * LANES
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_levels(values, importance, at, 32, num_lanes, x, w, fields, codes)
        levels_32(x, w, fields, codes)
        for lane in range(num_lanes):
            put_half(fields[lane], data, (group * LANES + lane) * 18)
            fields[lane] = np.float32(1) / fields[lane] if fields[lane] != 0 else np.float32(0)
        nearest_32(x, w, fields, codes)
        for lane in range(num_lanes):
            put_nibbles(codes, lane, data, (group * LANES + lane) * 18 + 2)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def pack_iq4_xs(values: Any, importance: Any, data: Any, first: int, stop: int) -> None:
    """``quantize_iq4_xs``: groups of two blocks."""
    x, w, codes = np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.float32), np.empty(32 * LANES, np.uint8)
    fields = np.zeros(3 * LANES, np.float32)
    for group in range(first, stop):
        at = group * 512
        num_lanes = min(LANES, (values.size - at) // 32)
        lay_out(values, at, 32, num_lanes, x)
        weigh_levels(values, importance, at, 256, num_lanes, x, w, fields, codes)
        levels_32(x, w, fields, codes)
        for block in range(num_lanes // 8):
            to = (2 * group + block) * 136
            largest = find_largest_scale(fields[8 * block : 8 * block + 8])
            scale = -largest / np.float32(32)
            put_half(scale, data, to)
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            high = np.int64(0)
            for k in range(8):
                level = max(-32, min(31, nearest(inverse * fields[8 * block + k])))
                product = scale * np.float32(level)
                fields[8 * block + k] = np.float32(1) / product if product != 0 else np.float32(0)
                level += 32
                high |= level >> 4 << 2 * k
                kept = data[to + 4 + k // 2] if k % 2 else np.uint8(0)
                data[to + 4 + k // 2] = kept | (level & 15) << 4 * (k % 2)
            data[to + 2], data[to + 3] = high & 255, high >> 8
        nearest_32(x, w, fields, codes)
        for lane in range(num_lanes):
            put_nibbles(codes, lane, data, (2 * group + lane // 8) * 136 + 8 + 16 * (lane % 8))


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
def encode_iq4_nl(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs IQ4_NL; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_iq4_nl(values, importance, data, first, stop)


@compile_kernel
def encode_iq4_xs(values: Any, importance: Any, data: Any, num_chunks: int) -> None:
    """Packs IQ4_XS; arrays as the module says, in ``num_chunks`` parts."""
    for chunk in prange(num_chunks):
        first, stop = share(chunk, -(-values.size // 512), num_chunks)
        pack_iq4_xs(values, importance, data, first, stop)


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


#: The kernels under the names of their formats.
KERNELS: dict[str, Callable[..., None]] = {
    "q4_0": encode_q4_0,
    "q4_1": encode_q4_1,
    "q5_0": encode_q5_0,
    "q5_1": encode_q5_1,
    "q8_0": encode_q8_0,
    "q4_k": encode_q4_k,
    "q6_k": encode_q6_k,
    "q5_k": encode_q5_k,
    "q3_k": encode_q3_k,
    "q2_k": encode_q2_k,
    "iq4_nl": encode_iq4_nl,
    "iq4_xs": encode_iq4_xs,
    "tq1_0": encode_tq1_0,
    "tq2_0": encode_tq2_0,
}
