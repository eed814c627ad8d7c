"""Draws the memory of strategies against the size of a device: stacked bars in a standalone SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ingle.report.drawing import nice_ticks, tick_label
from ingle.wording import size

#: Parts of memory in the order of the bars, with their names and colors; distinguishable without color vision.
PARTS = {
    "weights_bytes": ("weights", "#3b4a63"),
    "gather_bytes": ("gathers", "#7b93b8"),
    "adapter_bytes": ("adapter", "#2f8f83"),
    "gradient_bytes": ("gradients", "#8cc9a1"),
    "optimizer_bytes": ("optimizer", "#d9b44a"),
    "activation_bytes": ("activations", "#d9783f"),
    "overhead_bytes": ("overhead", "#b9b3a8"),
}
_PLOT, _RIGHT, _TOP, _ROW, _BAR = 520, 90, 74, 34, 20
#: Width of a character of a label and of a note, in pixels; system fonts differ, so these are wide.
_LABEL_CHARACTER, _NOTE_CHARACTER = 7.6, 6.6
_GIB = 1 << 30
_STYLE = """
svg { background: #fdfcf9; font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
text { fill: #2b2925; }
.soft { fill: #6b665d; font-size: 12px; paint-order: stroke; stroke: #fdfcf9; stroke-width: 3px; }
.title { font-size: 16px; font-weight: 650; }
.chosen { font-weight: 700; } .grid { stroke: #e5e0d6; } .card { stroke: #b3261e; stroke-width: 1.6; }
.usable { stroke: #b3261e; stroke-dasharray: 4 3; opacity: .7; } .limit { fill: #b3261e; font-size: 12px; }
.over { opacity: .45; }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One strategy.

    Attributes:
        label: Its name.
        parts: Bytes by purpose; keys of :data:`PARTS`.
        fits: Whether it fits on the device.
        is_chosen: Whether it is the plan.
        note: What follows the bar: its speed, or why it does not fit.
    """

    label: str
    parts: dict[str, int]
    fits: bool
    is_chosen: bool
    note: str

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.get(name, 0) for name in PARTS)


def plan_picture(title: str, bars: Sequence[Bar], device_bytes: int, usable_bytes: float) -> str:
    """Returns an SVG document.

    Args:
        title: Model and devices.
        bars: Strategies, from top to bottom.
        device_bytes: Memory of a device: a line.
        usable_bytes: What of it a run should use: a dashed line.
    """
    left = 26 + max(_LABEL_CHARACTER * (len(bar.label) + 2) for bar in bars)
    width = left + _PLOT + _RIGHT
    most = 1.06 * max([device_bytes, *(min(bar.total, 3 * device_bytes) for bar in bars)])
    scale = _PLOT / most
    floor = _TOP + _ROW * len(bars)
    parts = [f'<text class="title" x="16" y="26">{escape(title)}</text>', *_legend()]
    ticks = nice_ticks(0.0, most / _GIB, 7)
    for tick in ticks:
        x = left + tick * _GIB * scale
        label = tick_label(tick, ticks[1] - ticks[0] if len(ticks) > 1 else 1.0)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="soft" x="{width - 16:.0f}" y="{floor + 18}" text-anchor="end">GiB per device</text>')
    limits = sorted((left + usable_bytes * scale, left + device_bytes * scale))
    for index, bar in enumerate(bars):
        y = _TOP + index * _ROW + (_ROW - _BAR) / 2
        parts += _draw(bar, left, y, scale, most)
        x = left + min(bar.total, most) * scale + 6
        for limit in limits:  # a note that would cross a line begins after it
            x = limit + 6 if x - 3 < limit < x + _NOTE_CHARACTER * len(bar.note) else x
        parts.append(f'<text class="soft" x="{x:.1f}" y="{y + _BAR / 2 + 4.5:.1f}">{escape(bar.note)}</text>')
    for style, x in zip(("usable", "card"), limits, strict=True):
        parts.append(f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{floor}"/>')
    text = f"{size(device_bytes)}, {size(usable_bytes)} usable"
    parts.append(f'<text class="limit" x="{limits[-1]:.1f}" y="{floor + 36}" text-anchor="middle">{text}</text>')
    height = floor + 48
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}"'
    body = "\n".join(parts)
    return (
        f'{head} height="{height}" role="img" aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n{body}\n</svg>\n'
    )


def _legend() -> list[str]:
    shapes, x = [], 16.0
    for name, color in PARTS.values():
        shapes.append(f'<rect x="{x:.0f}" y="42" width="12" height="12" rx="2" fill="{color}"/>')
        shapes.append(f'<text class="soft" x="{x + 17:.0f}" y="52">{name}</text>')
        x += 33 + 7.0 * len(name)
    return shapes


def _draw(bar: Bar, left: float, y: float, scale: float, most: float) -> list[str]:
    """Returns the label and the parts of a bar; one that is too long for the picture ends at its edge."""
    style = ' class="chosen"' if bar.is_chosen else "" if bar.fits else ' class="soft"'
    label = f"▸ {bar.label}" if bar.is_chosen else bar.label
    shapes = [f'<text{style} x="{left - 10:.1f}" y="{y + _BAR / 2 + 4.5:.1f}" text-anchor="end">{escape(label)}</text>']
    x, rest = left, most
    faded = "" if bar.fits else ' class="over"'
    for key, (name, color) in PARTS.items():
        shown = min(bar.parts.get(key, 0), rest)
        rest -= shown
        if shown > 0:
            width = shown * scale
            note = f"<title>{name} {size(bar.parts[key])}</title>"
            shapes.append(
                f'<rect{faded} x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" fill="{color}">{note}</rect>'
            )
            x += width
    return shapes
