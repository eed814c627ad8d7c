"""Comparisons in words: p-values, outcomes and the verdict on a metric."""

from __future__ import annotations

from ingle.report.metrics import Metric, find_metric
from ingle.report.results import MetricComparison, Outcome
from ingle.wording import plural

#: Level of significance, after Holm's correction.
LEVEL = 0.05

#: With fewer samples, no difference is significant: if all ``n`` samples improve, p is ``2 / 2^n``.
MIN_SAMPLES = 6

#: Below this number of samples, intervals by resampling are too narrow.
FEW_SAMPLES = 30

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def p_value(p: float | None) -> str:
    """Returns a p-value with two significant digits: ``0.031``, ``4.0e-18``."""
    if p is None:
        return "–"
    if p < 1e-300:
        return "< 1e-300"
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def p_relation(p: float, *, floor: float = 0.0) -> str:
    """Returns ``p = 0.031``, ``p = 4.0 × 10⁻¹⁸``, or ``p ≤ 0.0001`` at the floor of a simulation."""
    if p <= floor * 1.000001:
        return f"p ≤ {p:.1g}" if p < 0.0001 else f"p ≤ {p:.4f}"
    text = p_value(p)
    if text.startswith("<"):
        return "p < 10⁻³⁰⁰"
    if "e" not in text:
        return f"p = {text}" if p < 0.9995 else "p = 1"
    mantissa, exponent = text.split("e")
    return f"p = {mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def corrected_p(row: MetricComparison) -> str:
    """Returns the p-value after Holm's correction: ``p = 0.062``, ``p ≤ 0.0005``."""
    at_floor = row.p <= row.p_floor * 1.000001
    return p_relation(row.p_holm, floor=row.p_holm if at_floor else 0.0)


def correction(num_metrics: int) -> str | None:
    """Returns what p-values are corrected for; None for a single metric."""
    return f"after correction for {num_metrics} metrics" if num_metrics > 1 else None


def find_outcome(metric: Metric, delta: float, p_holm: float) -> Outcome:
    """Returns the outcome of a difference at the level of significance."""
    if p_holm >= LEVEL or delta == 0:
        return "unclear"
    return "better" if metric.is_better(delta) else "worse"


def lost_by_correction(row: MetricComparison) -> bool:
    """Returns whether a difference would be significant if its metric were the only one."""
    return row.outcome == "unclear" and row.p < LEVEL <= row.p_holm


def judge(row: MetricComparison, num_metrics: int) -> str:
    """Returns the outcome of a metric and its p-value: ``better (p = 0.004 after correction for 3 metrics)``.

    Args:
        row: The compared metric.
        num_metrics: Metrics of the task, for which p-values are corrected.
    """
    if lost_by_correction(row):
        return f"not significant {correction(num_metrics)} ({corrected_p(row)})"
    if row.outcome == "unclear":
        return "no significant difference"
    return row.outcome + (f" ({corrected_p(row)} {correction(num_metrics)})" if num_metrics > 1 else "")


def verdict(name: str, row: MetricComparison, num_metrics: int, base_name: str | None = None) -> str:
    """Returns one sentence on a compared metric.

    Args:
        name: The metric.
        row: Its figures.
        num_metrics: Metrics of the task, for which p-values are corrected.
        base_name: What the tuned model is compared with; None for its base.
    """
    metric = find_metric(name)
    difference = f"{metric.format(row.delta, signed=True)} {metric.format_interval(row.ci95, signed=True)}"
    base = metric.format(row.base) + (f" ({base_name})" if base_name else "")
    scores = f"{metric.title} {base} → {metric.format(row.tuned)}, {difference}"
    sentence = f"{scores}, {p_relation(row.p, floor=row.p_floor)}, n = {row.n:,}: {judge(row, num_metrics)}."
    if row.outcome != "unclear":
        return sentence
    if row.n < MIN_SAMPLES:
        return f"{sentence} With fewer than {MIN_SAMPLES} samples, no difference can be significant."
    if not row.mde80:
        return sentence
    return (
        f"{sentence} With this number of samples, a difference smaller than "
        f"{metric.format(row.mde80, signed=True).removeprefix('+')} would likely be missed."
    )


def few_samples(num_samples: int) -> str | None:
    """Returns the warning for a task with few samples; None for enough samples."""
    if num_samples >= FEW_SAMPLES:
        return None
    return (
        f"These scores are based on only {plural(num_samples, 'sample')}; "
        f"with fewer than {FEW_SAMPLES}, treat the intervals as rough."
    )
