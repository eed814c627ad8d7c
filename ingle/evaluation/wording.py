"""Comparisons in words, as print has them; the numbers are written by :mod:`ingle.wording`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ingle import wording
from ingle.evaluation.scorers import Scorer
from ingle.wording import title as title

#: Level of significance, after Holm's correction.
LEVEL = 0.05

#: Fewer samples cannot reach it: with ``n`` that all agree, p is ``2 / 2^n``.
LEAST_SAMPLES = 6

#: With fewer samples than this, intervals from resampling are too narrow to be relied on.
FEW_SAMPLES = 30


def score(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A score, or with ``signed`` a difference, as print has it: ``61.0``, ``−3.3``, ``41.2 %``, ``+50.0 points``."""
    return wording.score(metric, value, signed=signed).replace("-", "−")


def sample_score(metric: str, value: float | None) -> str:
    """The score of one sample: as :func:`score`, but right or wrong in words."""
    return ("right" if value else "wrong") if metric == "exact_match" else score(metric, value)


def interval(metric: str, bounds: Sequence[float | None]) -> str:
    """A 95 % interval of a difference: ``[+45.9, +51.4]``."""
    return wording.interval(metric, bounds, signed=True).replace("-", "−")


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


def corrected_p(row: Mapping[str, Any]) -> str:
    """The p-value that decides, after Holm's correction: ``p = 0.062``, ``p ≤ 0.0005``."""
    at_floor = row["p"] <= row["p_floor"] * 1.000001
    return p_value(row["p_holm"], floor=row["p_holm"] if at_floor else 0.0)


def judgement(row: Mapping[str, Any], num_metrics: int) -> str:
    """What one compared metric shows, and by which p-value: ``better (p = 0.004 after correction for 3 metrics)``.

    Args:
        row: Its entry of the report.
        num_metrics: Metrics of the task, for which p-values are corrected.
    """
    correction = f"after correction for {num_metrics} metrics"
    if row["outcome"] != "unclear":
        return str(row["outcome"]) + (f" ({corrected_p(row)} {correction})" if num_metrics > 1 else "")
    if row["p"] < LEVEL <= row["p_holm"]:
        return f"not significant {correction} ({corrected_p(row)})"
    return "no significant difference"


def verdict(metric: str, row: Mapping[str, Any], num_metrics: int) -> str:
    """One honest sentence about one compared metric.

    Args:
        metric: Its name.
        row: Its entry of the report.
        num_metrics: Metrics of the task, for which p-values are corrected.
    """
    sentence = (
        f"{title(metric)} {score(metric, row['base'])} → {score(metric, row['tuned'])}, "
        f"{score(metric, row['delta'], signed=True)} {interval(metric, row['ci95'])}, "
        f"{p_value(row['p'], floor=row['p_floor'])}, n = {row['n']:,}: {judgement(row, num_metrics)}."
    )
    return sentence + (_power(metric, row) if row["outcome"] == "unclear" else "")


def few_samples(num_samples: int) -> str | None:
    """What to warn of where a task has few samples; None where it has enough."""
    if num_samples >= FEW_SAMPLES:
        return None
    return (
        f"These scores rest on only {wording.plural(num_samples, 'sample')}; "
        f"with fewer than {FEW_SAMPLES}, treat the intervals as rough."
    )


def _power(metric: str, row: Mapping[str, Any]) -> str:
    if row["n"] < LEAST_SAMPLES:
        return f" With fewer than {LEAST_SAMPLES} samples, no difference can be significant, however large it is."
    if not row["mde80"]:
        return ""
    return f" With this many samples, a difference smaller than {score(metric, row['mde80'])} would likely go unseen."
