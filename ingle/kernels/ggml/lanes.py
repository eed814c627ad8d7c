"""Passes over the sub-blocks of GGUF's formats, sixteen side by side in vector registers: maxima, weights, codes.

ggml searches the scales of a block with sums whose order decides the last bits, so nothing here is reordered.  Speed
comes from sixteen sub-blocks that lie side by side: element ``k`` of all sixteen, then ``k + 1``.

Source: ggml's ``ggml-quants.c`` (MIT licence), whose functions are named where they are followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from ingle.kernels.numba.vector import BYTE, Array, Variable, Vector, fill, repeat

#: Sub-blocks side by side.
LANES = 16
#: Below this a block counts as zero.
TINIEST = 1e-15


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


def write_rounds(x: Array, w: Array, fields: Array, codes: Array, *, count: int, limit: int, bias: int) -> None:
    """Codes ``roundf(x * fields[0]) + bias``: half away from zero; before the bias at most ``limit`` in size."""
    inverse = fields.load(0, LANES)

    def put(place: Any) -> None:
        v = (x.load(place, LANES) * inverse).at_least(float(-limit)).at_most(float(limit))
        whole = v.truncate()
        away = ((v - whole).size() >= 0.5).choose(1.0, fill(x.builder, 0.0, LANES))
        store_codes(codes, place, (v < 0.0).choose(whole - away, whole + away) + float(bias))

    each(x, count, put)


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

    ``importance``: those in ``w`` times ``sqrt(fields[0] + x^2)``; ``size``: ``|x|``;
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


#: The pass that several families make.
weigh_32 = make_lanes(write_weights, count=32, kind="importance")
