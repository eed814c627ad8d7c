"""The chart of the k-quants pull request: size of the file against what is lost, one dot a format, the front marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ingle.report.charts import Scale, nice_ticks, svg, tick_label

#: Height of the plot, width of a character of a label, and height of a line, in pixels.
_HEIGHT, _CHARACTER, _LINE = 420, 7.2, 15


@dataclass(frozen=True, slots=True)
class Dot:
    """One format.

    Attributes:
        label: Its name.
        size: Of its file, in the unit of the axis.
        value: What is lost.
        low: Lower end of the interval; NaN for none.
        high: Upper end.
        kind: ``front``, ``chosen`` or ``other``.
        note: What the pointer reads.
    """

    label: str
    size: float
    value: float
    low: float
    high: float
    kind: str
    note: str


@dataclass(frozen=True, slots=True)
class Axes:
    """What the axes say.

    Attributes:
        across: Title of the horizontal axis.
        up: Title of the vertical axis.
        line: Value at which a dashed line is drawn.
        line_label: What stands at it.
        top: Dots above this value are drawn as arrows at the upper edge.
        logarithmic: Whether the vertical axis counts in powers of ten.
        has_front: Whether the front is drawn as a line; it is one of divergence, and means nothing elsewhere.
    """

    across: str
    up: str
    line: float
    line_label: str
    top: float = math.inf
    logarithmic: bool = True
    has_front: bool = True

    def level(self, value: float) -> float:
        """Where a value lies on the vertical axis."""
        cut = min(value, self.top)
        return math.log10(max(cut, 1e-300)) if self.logarithmic else cut


def size_chart(dots: Sequence[Dot], axes: Axes, *, width: int) -> str:
    """Dots over size, and the front as a line of steps.

    Args:
        dots: At least one; values above 0 where the axis is logarithmic.
        axes: Titles and the marked line.
        width: Pixels.
    """
    left, right, top, floor = 62.0, width - 16.0, 30.0, float(_HEIGHT)
    x = _across(dots, left, right)
    y = _up(dots, axes, floor, top)
    parts = [_grid_up(y, axes, left, right), _grid_across(x, axes.across, floor, width)]
    place = y(axes.level(axes.line))
    if place <= floor:
        parts.append(f'<line class="limit" x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{right}" y="{place - 6:.1f}" text-anchor="end">{escape(axes.line_label)}</text>'
        )
    front = _falling(dots) if axes.has_front else []
    if len(front) > 1:
        corners = [f"M{x(front[0].size):.1f},{y(axes.level(front[0].value)):.1f}"]
        corners += [f"H{x(dot.size):.1f}V{y(axes.level(dot.value)):.1f}" for dot in front[1:]]
        parts.append(f'<path class="steps" d="{"".join(corners)}"/>')
    taken = [(x(dot.size) - 6, y(axes.level(dot.value)) - 6, 12.0, 12.0) for dot in dots]
    length = _CHARACTER * len(axes.line_label)
    taken.append((right - length, place - 17, length, 13.0))
    by_weight = sorted(dots, key=lambda dot: ("chosen", "front", "other").index(dot.kind))
    parts += [_draw(dot, x, y, axes) for dot in reversed(by_weight)]  # the chosen one lies on top, and is named first
    for dot in by_weight:
        parts.append(_label(dot, x(dot.size), y(axes.level(dot.value)), taken, left, right))
    return svg(width, _HEIGHT + 44, f"{axes.up} against {axes.across}", parts)


def _falling(dots: Sequence[Dot]) -> list[Dot]:
    """Dots of the front that lose less than every smaller one; a front of another figure may have others."""
    kept: list[Dot] = []
    for dot in sorted((dot for dot in dots if dot.kind != "other"), key=lambda dot: dot.size):
        if not kept or dot.value < kept[-1].value:
            kept.append(dot)
    return kept


def _across(dots: Sequence[Dot], left: float, right: float) -> Scale:
    low, high = min(dot.size for dot in dots), max(dot.size for dot in dots)
    pad = 0.06 * ((high - low) or high)
    return Scale(max(0.0, low - pad), high + 1.6 * pad, left, right)


def _up(dots: Sequence[Dot], axes: Axes, floor: float, top: float) -> Scale:
    """From the smallest to the largest value, the marked line included."""
    levels = [axes.level(dot.value) for dot in dots] + [axes.level(axes.line)]
    low, high = min(levels), max(levels)
    pad = 0.07 * (max(high - low, 0.3) if axes.logarithmic else (high - low) or abs(high) or 1.0)
    return Scale(low - pad, high + pad, floor, top)


def _grid_up(y: Scale, axes: Axes, left: float, right: float) -> str:
    parts = []
    for value, text in _ticks_up(y, axes):
        place = y(axes.level(value))
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{place + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<text class="axis" x="8" y="14">{escape(axes.up)}</text>')
    return "".join(parts)


def _ticks_up(y: Scale, axes: Axes) -> list[tuple[float, str]]:
    if not axes.logarithmic:
        ticks = nice_ticks(y.low, y.high, 6)
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
        return [(tick, tick_label(tick, step)) for tick in ticks]
    factors = (1, 2, 5) if y.high - y.low < 3 else (1,)
    decades = range(math.floor(y.low), math.ceil(y.high) + 1)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    return [
        (value, f"{value:g}" if value >= 1e-4 else f"{value:.0e}".replace("e-0", "e−"))
        for value in values
        if y.low <= math.log10(value) <= y.high
    ]


def _grid_across(x: Scale, title: str, floor: float, width: int) -> str:
    ticks = nice_ticks(x.low, x.high, max(3, width // 130))
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    parts = [f'<line class="zero" x1="{x.start}" x2="{x.end}" y1="{floor}" y2="{floor}"/>']
    for tick in ticks:
        label = tick_label(tick, step)
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{floor + 17}" text-anchor="middle">{label}</text>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{floor + 36}" text-anchor="middle">{escape(title)}</text>')
    return "".join(parts)


def _draw(dot: Dot, x: Scale, y: Scale, axes: Axes) -> str:
    across, up = x(dot.size), y(axes.level(dot.value))
    parts = [f'<g class="format {dot.kind}"><title>{escape(dot.note)}</title>']
    if dot.value <= axes.top and not math.isnan(dot.low):
        ends = [y(max(y.low, axes.level(end))) for end in (dot.low, dot.high)]
        parts.append(f'<line class="bar" x1="{across:.1f}" x2="{across:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>')
    if dot.kind == "chosen":
        parts.append(f'<circle class="ring" cx="{across:.1f}" cy="{up:.1f}" r="10"/>')
    if dot.value > axes.top:
        parts.append(f'<path class="dot" d="M{across:.1f},{up - 7:.1f}l5.5,9h-11z"/></g>')
    else:
        parts.append(f'<circle class="dot" cx="{across:.1f}" cy="{up:.1f}" r="5"/></g>')
    return "".join(parts)


Box = tuple[float, float, float, float]


def _label(dot: Dot, across: float, up: float, taken: list[Box], left: float, right: float) -> str:
    """The name next to its dot where it covers nothing; elsewhere only the tooltip has it."""
    length = _CHARACTER * len(dot.label)
    reach = 14.0 if dot.kind == "chosen" else 9.0
    places: tuple[tuple[float, float, str, float], ...] = (
        (across + reach, up + 4, "start", across + reach),
        (across - reach, up + 4, "end", across - reach - length),
        (across, up - reach - 1, "middle", across - length / 2),
        (across, up + reach + 11, "middle", across - length / 2),
        (across + reach - 2, up - 8, "start", across + reach - 2),
        (across - reach + 2, up - 8, "end", across - reach + 2 - length),
        (across + reach - 2, up + 16, "start", across + reach - 2),
        (across - reach + 2, up + 16, "end", across - reach + 2 - length),
    )
    if dot.kind != "other":  # the line of the front comes from above and leaves to the right
        places = (places[1], places[3], places[4], places[7], places[0], places[2])
    for text_x, text_y, anchor, start in places:
        box = (start, text_y - 11, length, float(_LINE) - 2)
        inside = start >= left and start + length <= right and text_y >= 24 and text_y <= _HEIGHT - 3
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return (
                f'<text class="name {dot.kind}" x="{text_x:.1f}" y="{text_y:.1f}" text-anchor="{anchor}">'
                f"{escape(dot.label)}</text>"
            )
    return ""


def _overlap(one: Box, other: Box) -> bool:
    return (
        one[0] < other[0] + other[2]
        and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3]
        and other[1] < one[1] + one[3]
    )
