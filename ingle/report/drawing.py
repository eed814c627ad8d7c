"""Parts of the charts: scales with round ticks, axes, and elements of SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: The smallest value on a logarithmic scale; smaller ones are drawn there.
LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in ``[low, high]`` to pixels from ``start`` to ``end``, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(
        cls, values: Sequence[float], start: float, end: float, pads: Sequence[float], log: bool = False
    ) -> Scale:
        """Returns a scale for all values, padded at either end by a share of their range."""
        low, high = (math.log10(end) if log else end for end in (min(values), max(values)))
        span = max(high - low, 0.3) if log else (high - low) or abs(high) or 1.0
        ends = low - pads[0] * span, high + pads[1] * span
        return cls(10.0 ** ends[0], 10.0 ** ends[1], start, end, True) if log else cls(*ends, start, end)

    def __call__(self, value: float) -> float:
        """Returns the pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log10(max(number, LEAST)) for number in (low, high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, num_ticks: int) -> list[tuple[float, str]]:
        """Returns about ``num_ticks`` round values on the scale with their labels."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [
                factor * 10.0**decade for decade in decades for factor in ((1, 2, 5) if len(decades) < 5 else (1,))
            ]
            ticks = [(value, _power_label(value)) for value in values if self.low <= value <= self.high]
            if len(ticks) > 2:  # a narrow range has few round powers
                return ticks
        values = nice_ticks(self.low, self.high, num_ticks)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        return [(value, tick_label(value, step)) for value in values]


def nice_ticks(low: float, high: float, num_ticks: int) -> list[float]:
    """Returns about ``num_ticks`` round numbers within ``[low, high]``."""
    raw = (high - low) / max(1, num_ticks)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, step: float) -> str:
    """Returns a tick's number with as many digits as its step needs."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or step < 1e-4:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += 1 if round(step * 10**digits, 6) % 1 else 0
    return f"{value:,.{digits}f}".replace("-", "−")


def y_axis(y: Scale, x: Scale, title: str, num_ticks: int) -> list[str]:
    """Returns a title, labels and horizontal lines of the grid."""
    parts = [text("axis", x.start, y.end - 14, title)]
    for value, label in y.ticks(num_ticks):
        parts.append(line("grid", x.start, x.end, y(value), y(value)))
        parts.append(text("tick", x.start - 8, y(value) + 4, label, "end"))
    return parts


def x_axis(x: Scale, floor: float, title: str, ticks: Sequence[tuple[float, str]]) -> list[str]:
    """Returns labels and a title below ``floor``."""
    labels = [text("tick", x(value), floor + 17, label, "middle") for value, label in ticks]
    return [*labels, text("axis", (x.start + x.end) / 2, floor + 35, title, "middle")]


def line(style: str | None, x1: float, x2: float, y1: float, y2: float) -> str:
    """Returns a line; ``style`` is a CSS class, and coordinates are pixels."""
    return tag("line", class_=style, x1=x1, x2=x2, y1=y1, y2=y2)


def circle(style: str | None, x: float, y: float, radius: float) -> str:
    """Returns a circle around a place."""
    return tag("circle", class_=style, cx=x, cy=y, r=radius)


def text(style: str | None, x: float, y: float, words: str, anchor: str | None = None) -> str:
    """Returns a line of text, which ``anchor`` aligns: ``start`` (the default), ``middle`` or ``end``."""
    return tag("text", escape(words), class_=style, x=x, y=y, text_anchor=anchor)


def group(style: str, note: str, shapes: Sequence[str]) -> str:
    """Returns shapes with a common tooltip."""
    return tag("g", tag("title", escape(note)) + "".join(shapes), class_=style)


def svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """Returns a complete picture; screen readers say its label."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg class="chart" {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def tag(name: str, content: str | None = None, /, **attributes: str | float | None) -> str:
    """Returns an element; ``content`` is markup, attributes of None are left out, numbers have one decimal."""
    written = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = escape(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
            written.append(f'{key.removesuffix("_").replace("_", "-")}="{shown}"')
    return f"<{' '.join(written)}/>" if content is None else f"<{' '.join(written)}>{content}</{name}>"


def _power_label(value: float) -> str:
    if value >= 1e4:
        power = min(int(math.log10(value) + 1e-9) // 3, 4)
        return f"{value / 1000**power:g} {'?KMBT'[power]}"
    return f"{value:g}" if value >= 1e-4 else f"{value:.0e}".replace("e-0", "e−")
