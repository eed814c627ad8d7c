"""The interface of scorers: answers in, one row of sufficient statistics per sample out.

The score of a task is a function of the column sums of the statistics. Plain means (score, 1), ratios (negative
log-likelihood, bytes) and corpus scores (n-gram counts) all have this form, so every test and interval of
:mod:`ingle.evaluation.statistics` works on every metric without scoring again.

Legend: S samples, K sufficient statistics of a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ingle.evaluation.statistics import Floats
from ingle.report.metrics import Metric

#: Accepted answers of each sample.
References = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Likelihood of one reference text under a model.

    Attributes:
        nll: Negative log-likelihood of the scored tokens, in nats.
        num_tokens: Number of scored tokens.
        num_bytes: Length of their text in UTF-8.
    """

    nll: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """Outputs of one model for the samples of a task, in their order.

    Attributes:
        answers: Generated texts; empty if no metric reads them.
        likelihoods: Likelihood of each sample's first reference; empty if no metric reads them.
    """

    answers: tuple[str, ...] = ()
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """One metric of one model.

    Attributes:
        value: Score of the task, as the reference implementation computes it.
        per_sample: Score of each sample, [S]; ``value`` need not be their mean.
        statistics: Sufficient statistics, float64 [S, K].
        signature: All options of the metric; scores with equal signatures can be compared.
        num_unparsed: Number of answers that ``answer_pattern`` does not match; they score 0.
    """

    value: float
    per_sample: Floats
    statistics: Floats
    signature: str
    num_unparsed: int = 0


class Scorer(ABC):
    """Computes one metric.

    Attributes:
        metric: Description of the metric.
    """

    metric: ClassVar[Metric]

    @abstractmethod
    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores all samples, each against one or more references."""

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the scores [...] of summed statistics [..., K]: the first over the second, or 0 for a count of 0."""
        counts = totals[..., 1]
        return np.divide(totals[..., 0], counts, out=np.zeros_like(counts), where=counts > 0)


def mean_scores(per_sample: Sequence[float] | Floats, signature: str, num_unparsed: int = 0) -> Scores:
    """Returns scores whose value is the mean over the samples."""
    values = np.asarray(per_sample, dtype=np.float64)
    statistics = np.stack((values, np.ones_like(values)), axis=1)
    return Scores(float(values.mean()), values, statistics, signature, num_unparsed)
