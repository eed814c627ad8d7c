"""Charts as inline SVG: no script, no network, colours from the page's style sheet.

Every chart is drawn for a given width, since text in a scaled SVG would shrink with it; a page holds a wide and a
narrow drawing and shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: More points than this cannot be told apart on a page.
MAX_POINTS = 600

#: Places on the x axis that answer to the pointer.
MAX_HITS = 120


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels, linearly."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One row of an interval plot, in units of its axis; ``better`` is to the right.

    Attributes:
        label: Name of the row.
        value: The difference.
        low: Lower end of its interval; NaN for none.
        high: Upper end.
        outcome: ``better``, ``worse`` or ``unclear``.
        note: What the pointer reads.
    """

    label: str
    value: float
    low: float
    high: float
    outcome: str
    note: str


def nice_ticks(low: float, high: float, num_ticks: int) -> list[float]:
    """Round numbers within ``[low, high]``, about ``num_ticks`` of them."""
    raw = (high - low) / max(1, num_ticks)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, step: float) -> str:
    """A tick's number with as many digits as its step needs."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or step < 1e-4:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += 1 if round(step * 10**digits, 6) % 1 else 0
    return f"{value:,.{digits}f}".replace("-", "−")


def smooth(values: Floats, span: float) -> Floats:
    """Exponential moving mean over about ``span`` values, without the pull of its start towards 0."""
    keep = 1.0 - 2.0 / (span + 1.0)
    total = weight = 0.0
    means = np.empty_like(values)
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        means[index] = total / weight
    return means


def smoothing_span(num_steps: int) -> int:
    """How many steps the smoothed curve averages over: a thirtieth of the run, at least 5."""
    return max(5, round(num_steps / 30))


def loss_curve(steps: Floats, losses: Floats, lrs: Floats | None, *, width: int, height: int = 300) -> str:
    """Loss over steps, each step faint and their moving mean strong, with the learning rate below.

    Args:
        steps: Step numbers, rising.
        losses: Loss of each step.
        lrs: Learning rate of each step, or None.
        width: Pixels.
        height: Pixels of the loss panel.
    """
    left, right, top, bottom = 54, 14, 26, 28
    means = smooth(losses, smoothing_span(len(losses)))
    span = float(losses.max() - losses.min()) or max(abs(float(losses[0])), 1.0) * 0.1
    y = Scale(max(0.0, losses.min() - 0.06 * span), losses.max() + 0.04 * span, height - bottom, top)
    first, last = float(steps[0]), float(steps[-1])
    x = Scale(first, last if last > first else first + 1.0, left, width - right)
    parts = [_y_axis(y, left, width - right, "loss (nats per supervised token)", 5)]
    if len(steps) > 1:
        parts.append(f'<path class="raw" d="{_path(steps, losses, x, y)}"/>')
        parts.append(f'<path class="mean" d="{_path(steps, means, x, y)}"/>')
    else:
        parts.append(f'<circle class="dot" cx="{x(first):.1f}" cy="{y(losses[0]):.1f}" r="4"/>')
    floor = float(height - bottom)
    if lrs is not None:
        strip_top, floor = height + 14.0, height + 72.0
        lr_y = Scale(0.0, float(lrs.max()) or 1.0, floor, strip_top)
        parts.append(_y_axis(lr_y, left, width - right, "learning rate", 2))
        parts.append(f'<path class="lr" d="{_path(steps, lrs, x, lr_y)}"/>')
    parts.append(_x_axis(x, floor, "step", max(3, width // 130)))
    parts.append(_hits(steps, losses, means, x, y, top, floor, width - right))
    return svg(width, int(floor + 42), "Loss over steps", parts)


def interval_plot(rows: Sequence[Estimate], *, width: int, unit: str, flipped: bool = False) -> str:
    """Differences with their intervals around a zero line; better is to the right.

    Args:
        rows: Differences, positive where better.
        width: Pixels.
        unit: Of the axis.
        flipped: Whether the true differences have the other sign (lower is better), for the axis's numbers.
    """
    wide = width > 500
    left, right, row_height, top = (130 if wide else 122), 22, 34, 26
    ends = [end for row in rows for end in (row.low, row.high, row.value, 0.0) if not math.isnan(end)]
    low, high = min(ends), max(ends)
    pad = 0.08 * ((high - low) or 1.0)
    x = Scale(low - pad, high + pad, left, width - right)
    floor = top + row_height * len(rows)
    ticks = nice_ticks(x.low, x.high, max(3, (width - left) // 90))
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    parts = []
    for tick in ticks:
        shown = -tick if flipped else tick
        text = ("+" if shown > 0 else "") + tick_label(shown, step)
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 4}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{floor + 16}" text-anchor="middle">{text}</text>')
    zero = x(0.0)
    parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{top - 8}" y2="{floor + 2}"/>')
    parts += _directions(zero, left, width - right, top)
    for index, row in enumerate(rows):
        parts.append(_estimate(row, x, top + row_height * (index + 0.5), left))
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2:.0f}" y="{floor + 34}" text-anchor="middle">'
        f"{escape(unit)}</text>"
    )
    return svg(width, int(floor + 42), "Differences with 95 % intervals", parts)


def _directions(zero: float, left: float, right: float, top: float) -> list[str]:
    parts = []
    if right - zero > 60:
        parts.append(f'<text class="tick" x="{zero + 8:.1f}" y="{top - 12}">better →</text>')
    if zero - left > 60:
        parts.append(f'<text class="tick" x="{zero - 8:.1f}" y="{top - 12}" text-anchor="end">← worse</text>')
    return parts


def _estimate(row: Estimate, x: Scale, y: float, left: float) -> str:
    parts = [
        f'<g class="{escape(row.outcome)}"><title>{escape(row.note)}</title>',
        f'<text class="row" x="{left - 14}" y="{y + 4.5:.1f}" text-anchor="end">{escape(row.label)}</text>',
    ]
    if not math.isnan(row.low):
        low, high = x(row.low), x(row.high)
        parts.append(f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for end in (low, high):
            parts.append(f'<line class="whisker" x1="{end:.1f}" x2="{end:.1f}" y1="{y - 6:.1f}" y2="{y + 6:.1f}"/>')
    parts.append(f'<circle class="point" cx="{x(row.value):.1f}" cy="{y:.1f}" r="5.5"/></g>')
    return "".join(parts)


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A drawing of ``width`` x ``height`` pixels; ``label`` is read aloud."""
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _thin(values: Floats) -> npt.NDArray[np.intp]:
    """Indices of at most :data:`MAX_POINTS` points; of each stretch the lowest and the highest, so no spike is lost."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MAX_POINTS // 2)
    ends = [stretch[pick(values[stretch])] for stretch in stretches for pick in (np.argmin, np.argmax)]
    return np.unique([0, *ends, len(values) - 1])


def _path(xs: Floats, ys: Floats, x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(xs[index]):.1f},{y(ys[index]):.1f}" for index in _thin(ys))


def _y_axis(y: Scale, left: float, right: float, label: str, num_ticks: int) -> str:
    ticks = nice_ticks(y.low, y.high, num_ticks)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick_label(tick, step)}</text>'
        )
    parts.append(f'<text class="axis" x="{left}" y="{y.end - 8:.1f}">{escape(label)}</text>')
    return "".join(parts)


def _x_axis(x: Scale, floor: float, label: str, num_ticks: int) -> str:
    ticks = [tick for tick in nice_ticks(x.low, x.high, num_ticks) if float(tick).is_integer()]
    parts = [f'<line class="zero" x1="{x.start}" x2="{x.end}" y1="{floor}" y2="{floor}"/>']
    for tick in ticks:
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{floor + 17}" text-anchor="middle">{tick_label(tick, 1)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(x.start + x.end) / 2:.0f}" y="{floor + 35}" text-anchor="middle">'
        f"{escape(label)}</text>"
    )
    return "".join(parts)


def _hits(
    steps: Floats, losses: Floats, means: Floats, x: Scale, y: Scale, top: float, floor: float, right: float
) -> str:
    """Invisible columns that show the step's numbers under the pointer."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(MAX_HITS, len(steps))).astype(int))
    places = [x(float(steps[index])) for index in chosen]
    edges = [x.start, *((a + b) / 2 for a, b in pairwise(places)), x.end]
    parts = []
    for place, index, (low, high) in zip(places, chosen, pairwise(edges), strict=True):
        anchor, shift = ("end", -8) if place > right - 150 else ("start", 8)
        text = f"step {steps[index]:,.0f}: {losses[index]:.3f}, mean {means[index]:.3f}"
        parts.append(
            f'<g class="hit"><rect x="{low:.1f}" y="{top}" width="{max(high - low, 0.1):.1f}" '
            f'height="{floor - top:.0f}"/>'
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{floor:.0f}"/>'
            f'<circle cx="{place:.1f}" cy="{y(float(means[index])):.1f}" r="4"/>'
            f'<text x="{place + shift:.1f}" y="{top + 26}" text-anchor="{anchor}">{text}</text></g>'
        )
    return "".join(parts)
