"""Formats names, counts, sizes, times and scores for messages and reports."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence


def either(words: Sequence[str]) -> str:
    """Joins words with "or": ``a``, ``a or b``, ``a, b or c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known name most similar to ``name``; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def some(names: Collection[str]) -> str:
    """Returns the first three names in alphabetical order, and the number of others."""
    shown = ", ".join(sorted(names)[:3]) or "none"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error message, or of that of its cause."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def count(number: float) -> str:
    """Formats a count as ``1,234`` or, from 100,000, as three digits with K, M, B or T."""
    if abs(number) < 1e5:
        return f"{number:,.0f}"
    exponent = min(int(math.log10(abs(number)) // 3), 4)
    scaled = number / 1000**exponent
    if float(f"{abs(scaled):.3g}") >= 1000 and exponent < 4:
        exponent, scaled = exponent + 1, scaled / 1000
    digits = max(0, 2 - int(math.log10(abs(float(f"{scaled:.3g}")))))
    return f"{scaled:.{digits}f} {'?KMBT'[exponent]}"


def plural(number: int, noun: str) -> str:
    """Formats a count with a regular noun: ``1 token``, ``1,234 tokens``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(num_bytes: float) -> str:
    """Formats bytes in a suitable unit: ``812 MiB``, ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB" if abs(num_bytes) < 1000 else f"{num_bytes / 1024:,.1f} TiB"


def duration(seconds: float) -> str:
    """Formats a duration as ``8.2s``, ``42s``, ``3m05s`` or ``2h07m``."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
