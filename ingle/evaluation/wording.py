"""Comparisons in words, as print has them; the numbers are written by :mod:`ingle.wording`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle import wording
from ingle.evaluation.scorers import Scorer
from ingle.wording import title as title

#: Level of significance, after Holm's correction.
LEVEL = 0.05

#: Fewer samples cannot reach it: with ``n`` that all agree, p is ``2 / 2^n``.
LEAST_SAMPLES = 6


def score(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A score, or with ``signed`` a difference, as print has it: ``61.0``, ``−3.3``, ``41.2 %``, ``+50.0 points``."""
    text = wording.score(metric, value, signed=signed).replace("-", "−")
    return text.removesuffix(" %") + " points" if signed and text.endswith(" %") else text


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
    text = wording.p_value(p)
    if text.startswith("<"):
        return "p < 10⁻³⁰⁰"
    if "e" not in text:
        return f"p = {text}" if p < 0.9995 else "p = 1"
    mantissa, exponent = text.split("e")
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
    if row["n"] < LEAST_SAMPLES:
        return f" Fewer than {LEAST_SAMPLES} samples can show none, however large it is."
    if not row["mde80"]:
        return ""
    return f" A difference smaller than {score(metric, row['mde80'])} would likely go unseen with this many samples."
