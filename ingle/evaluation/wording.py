"""Numbers and verdicts in words, the same in the terminal, the report file and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ingle.evaluation.scorers import Scorer

#: How each metric is written: its title, factor and digits behind the point.
_STYLES: Mapping[str, tuple[str, float, int]] = {
    "exact_match": ("exact match", 100.0, 1),
    "bleu": ("BLEU", 1.0, 1),
    "chrf": ("chrF", 1.0, 1),
    "rouge_l": ("ROUGE-L", 1.0, 3),
    "perplexity": ("perplexity", 1.0, 2),
    "bits_per_byte": ("bits per byte", 1.0, 3),
}

#: Level of significance, after Holm's correction.
LEVEL = 0.05


def title(metric: str) -> str:
    """The metric's name as people write it."""
    return _STYLES[metric][0]


def score(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A score, or with ``signed`` a difference: ``61.0``, ``+48.7``, ``41.2 %``."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    _, factor, digits = _STYLES[metric]
    scaled = value * factor
    if abs(scaled) >= 10_000:
        digits = 0
    text = f"{scaled:+,.{digits}f}" if signed else f"{scaled:,.{digits}f}"
    if float(text.replace(",", "")) == 0.0:
        text = text.lstrip("+-")
    unit = (" points" if signed else " %") if metric == "exact_match" else ""
    return text.replace("-", "−") + unit


def sample_score(metric: str, value: float | None) -> str:
    """The score of one sample: as :func:`score`, but right or wrong in words."""
    return ("right" if value else "wrong") if metric == "exact_match" else score(metric, value)


def interval(metric: str, bounds: tuple[float | None, float | None] | list[float | None]) -> str:
    """A 95 % interval of a difference: ``[+45.9, +51.4]``."""
    return f"[{', '.join(score(metric, bound, signed=True).removesuffix(' points') for bound in bounds)}]"


def p_value(p: float, *, floor: float = 0.0) -> str:
    """A p-value with its relation: ``p = 0.031``, ``p = 4 × 10⁻¹⁸``, ``p ≤ 0.0001`` at the floor of a simulation."""
    if p <= floor * 1.000001:
        return f"p ≤ {p:.1g}" if p < 0.0001 else f"p ≤ {p:.4f}"
    if p < 1e-300:
        return "p < 10⁻³⁰⁰"
    if p >= 0.001:
        return f"p = {p:.3f}" if p < 0.9995 else "p = 1"
    mantissa, exponent = f"{p:.1e}".split("e")
    return f"p = {mantissa} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def outcome(scorer: Scorer, delta: float, p: float) -> str:
    """``better``, ``worse`` or ``unclear``."""
    if p >= LEVEL or delta == 0:
        return "unclear"
    return "better" if (delta > 0) == scorer.higher_is_better else "worse"


def verdict(metric: str, row: Mapping[str, Any]) -> str:
    """One honest sentence about one compared metric.

    Args:
        metric: Its name.
        row: Its entry of the report.
    """
    change = (
        f"{title(metric)} {score(metric, row['base'])} → {score(metric, row['tuned'])}, "
        f"{score(metric, row['delta'], signed=True)} {interval(metric, row['ci95'])}, "
        f"{p_value(row['p'], floor=row['p_floor'])}, n = {row['n']:,}"
    )
    match row["outcome"]:
        case "better":
            return f"{change}: better."
        case "worse":
            return f"{change}: worse."
        case _:
            return f"{change}: no significant difference.{_power(metric, row)}"


def _power(metric: str, row: Mapping[str, Any]) -> str:
    if not row["mde80"]:
        return ""
    return f" A difference smaller than {score(metric, row['mde80'])} would likely go unseen with this many samples."
