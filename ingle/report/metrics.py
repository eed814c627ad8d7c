"""Describes every metric: direction, range, statistics and the format of its scores.

Reports, tables and charts take everything that they need about a metric from this table. A scorer in
:mod:`ingle.evaluation.scorers` refers to its entry; results refer to metrics by their key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ingle.errors import EvaluationError

#: ``rate``: right or wrong per sample. ``ratio``: sum of the first statistic over the sum of the second, seen through
#: an increasing function (every mean is one). ``corpus``: any other function of all samples. The kind decides which
#: test and interval apply; see :mod:`ingle.evaluation.statistics.procedures`.
Kind = Literal["rate", "ratio", "corpus"]

#: What a scorer reads: answers as text, likelihoods of references, predictions of a task head, or masked tokens.
Reads = Literal["answers", "likelihoods", "predictions", "masked"]


@dataclass(frozen=True, slots=True)
class Metric:
    """Description of a metric.

    Attributes:
        name: Key in the config and in results.
        title: Name in text and tables.
        kind: Which tests and intervals apply.
        reads: Which model output is scored.
        higher_is_better: Direction of improvement.
        high: Largest possible score, ``inf`` where there is none; the smallest is ``low``.
        low: Smallest possible score.
        digits: Decimals shown.
        percent: Whether scores from 0 to 1 are shown in percent, and their differences in points.
    """

    name: str
    title: str
    kind: Kind
    reads: Reads
    higher_is_better: bool
    high: float
    low: float = 0.0
    digits: int = 1
    percent: bool = False

    @property
    def direction(self) -> str:
        """``higher is better`` or ``lower is better``."""
        return f"{'higher' if self.higher_is_better else 'lower'} is better"

    @property
    def chart(self) -> Literal["points", "relative"]:
        """The chart for differences: bounded scores share an axis of 100 points; others are in percent of the base."""
        return "points" if math.isfinite(self.high) else "relative"

    def is_better(self, change: float) -> bool:
        """Returns whether a change that is not 0 is an improvement."""
        return (change > 0) == self.higher_is_better

    def format(self, value: float | None, *, signed: bool = False) -> str:
        """Returns a score, or with ``signed`` a difference: ``61.0``, ``41.2 %``, ``−50.0 points``, ``–`` for None."""
        if value is None or math.isnan(value):
            return "–"
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        scaled = value * 100 if self.percent else value
        digits = self.digits if abs(scaled) < 10_000 else 0
        text = f"{scaled:{'+' if signed else ''},.{digits}f}"
        if float(text.replace(",", "")) == 0:
            text = text.lstrip("+-")
        return text.replace("-", "−") + self._unit(signed)

    def format_interval(self, bounds: Sequence[float | None], *, signed: bool = False) -> str:
        """Returns an interval without the unit: ``[+45.9, +51.4]``."""
        unit = self._unit(signed)
        return f"[{', '.join(self.format(bound, signed=signed).removesuffix(unit) for bound in bounds)}]"

    def format_sample(self, value: float | None) -> str:
        """Returns the score of one sample; ``right`` or ``wrong`` for a rate."""
        return ("right" if value else "wrong") if self.kind == "rate" else self.format(value)

    def _unit(self, signed: bool) -> str:
        return (" points" if signed else " %") if self.percent else ""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "exact match", "rate", "answers", True, 1.0, percent=True),
        Metric("bleu", "BLEU", "corpus", "answers", True, 100.0),
        Metric("chrf", "chrF", "corpus", "answers", True, 100.0),
        Metric("rouge_l", "ROUGE-L", "ratio", "answers", True, 1.0, digits=3),
        Metric("reward", "reward", "ratio", "answers", True, math.inf, low=-math.inf, digits=3),
        Metric("perplexity", "perplexity", "ratio", "likelihoods", False, math.inf, low=1.0, digits=2),
        Metric("bits_per_byte", "bits per byte", "ratio", "likelihoods", False, math.inf, digits=3),
        Metric("accuracy", "accuracy", "rate", "predictions", True, 1.0, percent=True),
        Metric("f1_macro", "macro F1", "corpus", "predictions", True, 1.0, digits=3),
        Metric("f1_micro", "micro F1", "corpus", "predictions", True, 1.0, digits=3),
        Metric("f1_weighted", "weighted F1", "corpus", "predictions", True, 1.0, digits=3),
        Metric("matthews", "Matthews correlation", "corpus", "predictions", True, 1.0, low=-1.0, digits=3),
        Metric("log_loss", "log loss", "ratio", "predictions", False, math.inf, digits=3),
        Metric("roc_auc", "ROC-AUC", "corpus", "predictions", True, 1.0, digits=3),
        Metric("pearson", "Pearson correlation", "corpus", "predictions", True, 1.0, low=-1.0, digits=3),
        Metric("spearman", "Spearman correlation", "corpus", "predictions", True, 1.0, low=-1.0, digits=3),
        Metric("mse", "mean squared error", "ratio", "predictions", False, math.inf, digits=3),
        Metric("tag_accuracy", "tag accuracy", "ratio", "predictions", True, 1.0, percent=True),
        Metric("entity_f1", "entity F1", "corpus", "predictions", True, 1.0, digits=3),
        Metric("entity_f1_macro", "macro entity F1", "corpus", "predictions", True, 1.0, digits=3),
        Metric("squad_em", "SQuAD exact match", "rate", "answers", True, 1.0, percent=True),
        Metric("squad_f1", "SQuAD F1", "ratio", "answers", True, 1.0, percent=True),
        Metric("masked_accuracy", "masked accuracy", "ratio", "masked", True, 1.0, percent=True),
        Metric("masked_perplexity", "masked perplexity", "ratio", "masked", False, math.inf, low=1.0, digits=2),
    )
}


def find_metric(name: str) -> Metric:
    """Returns the description of a metric.

    Raises:
        EvaluationError: There is no metric of this name.
    """
    if name not in METRICS:
        raise EvaluationError(f"There is no metric {name!r}.", fix=f"use one of {', '.join(METRICS)}")
    return METRICS[name]
