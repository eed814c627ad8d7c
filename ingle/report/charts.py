"""Static charts as inline SVG, without scripts; colors and fonts come from the page's style sheet.

Text in an SVG scales with the picture. So a page contains a wide and a narrow drawing of each chart and shows the one
that fits. Decision 0017 explains why no plotting library is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from ingle.report import drawing
from ingle.report.drawing import LEAST, Scale

Floats = npt.NDArray[np.float64]
#: Left, top, width and height, in pixels.
Box = tuple[float, float, float, float]

#: Widths of the two drawings of a chart, in pixels.
WIDE, NARROW = 880, 340

#: Largest number of points in a curve; more cannot be distinguished on a page.
MAX_POINTS = 600

#: Width of the columns of a loss curve that show their step's numbers under the pointer, in pixels.
_HIT_WIDTH = 7

#: Height of a size chart's plot, and width of a character and height of a line of its labels, in pixels.
_SIZE_HEIGHT, _CHARACTER, _LINE = 420.0, 7.2, 13.0

_ROW_CHARACTER = 7.9  # of an interval plot, whose labels are larger and bold


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval: one row of an interval plot or one dot of a size chart.

    Attributes:
        label: Its name.
        value: In units of the axis.
        low: Lower end of its interval; NaN for none.
        high: Upper end.
        kind: CSS class: ``better``, ``worse`` or ``unclear`` in an interval plot; ``front``, ``chosen`` or ``other`` in
            a size chart.
        note: Tooltip.
        size: Position on the horizontal axis of a size chart.
    """

    label: str
    value: float
    low: float
    high: float
    kind: str
    note: str
    size: float = 0.0


def both_widths(draw: Callable[[int], str]) -> dict[str, Markup]:
    """Returns the drawings of both widths, :data:`WIDE` and :data:`NARROW`, for a template."""
    return {"wide": Markup(draw(WIDE)), "narrow": Markup(draw(NARROW))}


def smooth(values: Floats, span: float) -> Floats:
    """Returns the exponential moving mean over about ``span`` values, corrected for its start at 0."""
    keep = 1.0 - 2.0 / (span + 1.0)
    total = weight = 0.0
    means = np.empty_like(values)
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        means[index] = total / weight
    return means


def smoothing_span(num_steps: int) -> int:
    """Returns how many steps the smoothed curve averages over: a thirtieth of the run, at least 5."""
    return max(5, round(num_steps / 30))


def loss_curve(
    steps: Floats,
    losses: Floats,
    lrs: Floats | None,
    *,
    width: int,
    height: int = 300,
    unit: str = "nats per supervised token",
    validation: Floats | None = None,
    kept_step: int | None = None,
    name: str = "loss",
    other: Floats | None = None,
) -> str:
    """Draws the loss of each step (faint) and its moving mean (strong), with the learning rate below.

    Args:
        steps: Step numbers, rising.
        losses: Loss of each step.
        lrs: Learning rate of each step, or None.
        width: Pixels.
        height: Pixels of the loss panel.
        unit: What the loss is measured in.
        validation: Steps and losses of validations, [V, 2]; None without.
        kept_step: The validated step whose weights were kept, which gets a ring.
        name: What is drawn in the place of the loss.
        other: A second value of each step, of which the moving mean is drawn.
    """
    floor = height - 28.0
    means = smooth(losses, smoothing_span(len(losses)))
    points = np.zeros((0, 2)) if validation is None else validation
    others = None if other is None else smooth(other, smoothing_span(len(other)))
    shown = np.concatenate([losses, points[:, 1], *([] if others is None else [others])])
    span = float(shown.max() - shown.min()) or max(abs(float(shown[0])), 1.0) * 0.1
    low = shown.min() - 0.06 * span
    y = Scale(max(0.0, low) if shown.min() >= 0 else low, shown.max() + 0.04 * span, floor, 26.0)
    first, last = float(min([steps[0], *points[:, 0]])), float(max([steps[-1], *points[:, 0]]))
    x = Scale(first, last if last > first else first + 1.0, 54.0, width - 14.0)
    parts = [*drawing.y_axis(y, x, f"{name} ({unit})", 5)]
    if len(steps) > 1:
        parts += [_path("raw", steps, losses, x, y), _path("mean", steps, means, x, y)]
    else:
        parts.append(drawing.circle("dot", x(steps[0]), y(losses[0]), 4))
    if others is not None:
        parts.append(
            _path("other", steps, others, x, y)
            if len(steps) > 1
            else drawing.circle("two", x(steps[0]), y(others[0]), 4)
        )
    if len(points):
        parts.append(_path("validation", points[:, 0], points[:, 1], x, y))
    for step, loss in points:
        dot = drawing.circle("dot", x(step), y(loss), 4)
        rings = [drawing.circle("ring", x(step), y(loss), 8)] if step == kept_step else []
        parts.append(drawing.group("validation", f"validation after step {step:,.0f}: {loss:.3f}", [dot, *rings]))
    if lrs is not None:
        floor = height + 72.0
        lr_y = Scale(0.0, float(lrs.max()) or 1.0, floor, height + 14.0)
        parts += [*drawing.y_axis(lr_y, x, "learning rate", 2), _path("lr", steps, lrs, x, lr_y)]
    ticks = [tick for tick in x.ticks(max(3, width // 130)) if float(tick[0]).is_integer()]
    parts += [drawing.line("zero", x.start, x.end, floor, floor), *drawing.x_axis(x, floor, "step", ticks)]
    parts += _hits(steps, losses, means, x, y, floor)
    label = (
        f"{name.capitalize()} over steps {first:,.0f} to {last:,.0f}, from {losses[0]:.3f} to a mean of {means[-1]:.3f}"
    )
    return drawing.svg(width, floor + 42, label, parts)


def interval_plot(rows: Sequence[Estimate], *, width: int, unit: str, flipped: bool = False) -> str:
    """Draws differences with their intervals around a zero line; better is to the right.

    Args:
        rows: Differences, positive where better.
        width: Pixels.
        unit: Title of the axis.
        flipped: Whether the true differences have the opposite sign (lower is better), for the axis's numbers.
    """
    room = 16.0 + _ROW_CHARACTER * max(len(row.label) for row in rows)
    left, right, top, row_height = max(130.0 if width > 500 else 122.0, room), width - 22.0, 26.0, 34.0
    ends = [end for row in rows for end in (row.low, row.high, row.value, 0.0) if not math.isnan(end)]
    x = Scale.around(ends, left, right, (0.08, 0.08))
    floor, zero, parts, ticks = top + row_height * len(rows), x(0.0), [], []
    for tick, label in x.ticks(max(3, int(width - left) // 90)):
        sign = "" if tick == 0 else "−" if (tick < 0) != flipped else "+"
        ticks.append((tick, sign + label.removeprefix("−")))
        parts.append(drawing.line("grid", x(tick), x(tick), top - 4, floor))
    parts += [*drawing.x_axis(x, floor, unit, ticks), drawing.line("zero", zero, zero, top - 8, floor + 2)]
    if right - zero > 60:
        parts.append(drawing.text("tick", zero + 8, top - 12, "better →"))
    if zero - left > 60:
        parts.append(drawing.text("tick", zero - 8, top - 12, "← worse", "end"))
    for index, row in enumerate(rows):
        y = top + row_height * (index + 0.5)
        shapes = [drawing.text("row", left - 14, y + 4.5, row.label, "end")]
        if not math.isnan(row.low):
            low, high = x(row.low), x(row.high)
            whiskers = ((low, high, 0), (low, low, 6), (high, high, 6))
            shapes += [drawing.line("whisker", x1, x2, y - half, y + half) for x1, x2, half in whiskers]
        parts.append(drawing.group(row.kind, row.note, [*shapes, drawing.circle("point", x(row.value), y, 5.5)]))
    return drawing.svg(width, floor + 42, "Differences with 95 % intervals", parts)


def size_chart(
    dots: Sequence[Estimate],
    *,
    width: int,
    titles: tuple[str, str],
    mark: tuple[float, str],
    y_max: float = math.inf,
    log: bool = True,
    log_size: bool = False,
    has_front: bool = True,
) -> str:
    """Draws a loss over a size, such as that of each format over the size of its file.

    Args:
        dots: At least one; values above 0 if ``log``.
        width: Pixels.
        titles: Titles of the horizontal and the vertical axis.
        mark: Value and label of a dashed line.
        y_max: Dots above this value are drawn as arrows at the upper edge.
        log: Whether the vertical axis is logarithmic.
        log_size: Whether the horizontal axis is.
        has_front: Whether a stepped line connects the dots of the Pareto front.
    """
    floor, least = _SIZE_HEIGHT, LEAST if log else -math.inf
    x = Scale.around([dot.size for dot in dots], 62.0, width - 16.0, (0.06, 0.1), log_size)
    values = [max(min(value, y_max), least) for value in (mark[0], *(dot.value for dot in dots))]
    ends = [end for dot in dots for end in (dot.low, dot.high) if math.isfinite(end) and end <= y_max and not log]
    y = Scale.around([*values, *ends], floor, 30.0, (0.07, 0.07), log)
    marked, *heights = (y(value) for value in values)
    places = [(x(dot.size), height) for dot, height in zip(dots, heights, strict=True)]
    parts = [*drawing.y_axis(y, x, titles[1], 6), *drawing.x_axis(x, floor, titles[0], x.ticks(max(3, width // 130)))]
    parts += [drawing.line("zero", x.start, x.end, floor, floor), drawing.line("limit", x.start, x.end, marked, marked)]
    parts.append(drawing.text("tick", x.end, marked - 6, mark[1], "end"))
    if has_front:
        parts.append(_steps([place for dot, place in zip(dots, places, strict=True) if dot.kind != "other"]))
    taken: list[Box] = [(left - 6, top - 6, 12, 12) for left, top in places]
    length = _CHARACTER * len(mark[1])
    taken.append((x.end - length, marked - 17, length, _LINE))
    order = sorted(zip(dots, places, strict=True), key=lambda pair: ("chosen", "front", "other").index(pair[0].kind))
    parts += [_dot(dot, *place, y, y_max) for dot, place in reversed(order)]  # the chosen one is drawn on top
    parts += [_label(dot, *place, taken, x) for dot, place in order]  # and labelled first
    return drawing.svg(width, floor + 42, f"{titles[1]} against {titles[0]}", parts)


def _steps(places: Sequence[tuple[float, float]]) -> str:
    """Returns the line through the dots that lie below every dot to their left."""
    line, lowest = "", -math.inf
    for x, y in sorted(places):
        if y > lowest:
            line += f"H{x:.1f}V{y:.1f}" if line else f"M{x:.1f},{y:.1f}"
            lowest = y
    return drawing.tag("path", class_="steps", d=line)


def _dot(dot: Estimate, x: float, y: float, scale: Scale, y_max: float) -> str:
    is_above = dot.value > y_max
    shapes = []
    if not is_above and not math.isnan(dot.low):
        low, high = (scale(min(max(end, scale.low), y_max)) for end in (dot.low, dot.high))
        shapes.append(drawing.line("bar", x, x, low, high))
    if dot.kind == "chosen":
        shapes.append(drawing.circle("ring", x, y, 10))
    arrow = drawing.tag("path", class_="dot", d=f"M{x:.1f},{y - 7:.1f}l5.5,9h-11z")
    return drawing.group(
        f"format {dot.kind}", dot.note, [*shapes, arrow if is_above else drawing.circle("dot", x, y, 5)]
    )


def _label(dot: Estimate, x: float, y: float, taken: list[Box], scale: Scale) -> str:
    """Returns the name next to its dot where it covers nothing; otherwise only the tooltip has it."""
    length, reach = _CHARACTER * len(dot.label), 14.0 if dot.kind == "chosen" else 9.0
    places = [
        *((reach, 4.0, "start"), (-reach, 4.0, "end"), (0.0, -reach - 1, "middle"), (0.0, reach + 11, "middle")),
        *((reach - 2, -8.0, "start"), (2 - reach, -8.0, "end"), (reach - 2, 16.0, "start"), (2 - reach, 16.0, "end")),
    ]
    if dot.kind != "other":  # the line of the front comes from above and leaves to the right
        places = [places[index] for index in (1, 3, 4, 7, 0, 2)]
    for dx, dy, anchor in places:
        left = x + dx - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * length
        box = (left, y + dy - 11, length, _LINE)
        is_inside = scale.start <= left <= scale.end - length and 24 <= y + dy <= _SIZE_HEIGHT - 3
        if is_inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return drawing.text(f"name {dot.kind}", x + dx, y + dy, dot.label, anchor)
    return ""


def _overlap(one: Box, other: Box) -> bool:
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def _hits(steps: Floats, losses: Floats, means: Floats, x: Scale, y: Scale, floor: float) -> list[str]:
    """Returns invisible columns that show their step's numbers under the pointer."""
    num_hits = min(int(x.end - x.start) // _HIT_WIDTH, len(steps))
    chosen = np.unique(np.linspace(0, len(steps) - 1, num_hits).astype(int))
    places = [x(float(steps[index])) for index in chosen]
    edges = [x.start, *((a + b) / 2 for a, b in pairwise(places)), x.end]
    parts = []
    for place, index, (left, right) in zip(places, chosen, pairwise(edges), strict=True):
        anchor, shift = ("end", -8) if place > x.end - 150 else ("start", 8)
        note = f"step {steps[index]:,.0f}: {losses[index]:.3f}, mean {means[index]:.3f}"
        shapes = (
            drawing.tag("rect", x=left, y=y.end, width=max(right - left, 0.1), height=floor - y.end),
            drawing.line(None, place, place, y.end, floor),
            drawing.circle(None, place, y(means[index]), 4),
            drawing.text(None, place + shift, y.end + 26, note, anchor),
        )
        parts.append(drawing.tag("g", "".join(shapes), class_="hit"))
    return parts


def _thin(values: Floats) -> npt.NDArray[np.intp]:
    """Returns indices of at most :data:`MAX_POINTS` values; the lowest and highest of each stretch keep every spike."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MAX_POINTS // 2)
    ends = [stretch[pick(values[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)]
    return np.unique([0, *ends, len(values) - 1])


def _path(style: str, xs: Floats, ys: Floats, x: Scale, y: Scale) -> str:
    points = (f"{x(xs[index]):.1f},{y(ys[index]):.1f}" for index in _thin(ys))
    return drawing.tag("path", class_=style, d="M" + "L".join(points))
