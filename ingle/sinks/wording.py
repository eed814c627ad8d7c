"""Counts, sizes, times and scores as people read them."""

from __future__ import annotations

import math

#: Metrics that are shares and read best in percent.
_SHARES = ("exact_match",)
_DIGITS = {"bleu": 1, "chrf": 1, "rouge_l": 3, "perplexity": 2, "bits_per_byte": 3}
_TITLES = {
    "exact_match": "exact match",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}


def count(number: float) -> str:
    """``1,234`` or, from a hundred thousand on, three digits with K, M, B or T."""
    if abs(number) < 1e5:
        return f"{number:,.0f}"
    exponent = min(int(math.log10(abs(number)) // 3), 4)
    scaled = number / 1000**exponent
    if float(f"{abs(scaled):.3g}") >= 1000 and exponent < 4:
        exponent, scaled = exponent + 1, scaled / 1000
    digits = max(0, 2 - int(math.log10(abs(float(f"{scaled:.3g}")))))
    return f"{scaled:.{digits}f} {'?KMBT'[exponent]}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits: ``812 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def duration(seconds: float) -> str:
    """``8s``, ``3m05s`` or ``2h07m``."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def title(metric: str) -> str:
    """A metric's name as people write it."""
    return _TITLES.get(metric, metric)


def score(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A score, or with ``signed`` a difference; shares in percent."""
    if value is None:
        return "–"
    scaled = value * 100 if metric in _SHARES else value
    text = f"{scaled:+,.{_DIGITS.get(metric, 1)}f}" if signed else f"{scaled:,.{_DIGITS.get(metric, 1)}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text + (" %" if metric in _SHARES else "")


def p_value(p: float | None) -> str:
    """A p-value with two significant digits."""
    if p is None:
        return "–"
    if p < 1e-300:
        return "< 1e-300"
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
