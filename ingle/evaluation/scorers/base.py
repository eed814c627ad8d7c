"""What a scorer is: it turns answers into sufficient statistics, one row a sample.

The corpus score is a function of the statistics' column sums.  That one shape holds for plain means (score, 1), for
ratios (negative log-likelihood, bytes) and for corpus scores (n-gram counts), so every test and interval of
:mod:`ingle.evaluation.stats` and :mod:`ingle.evaluation.intervals` works on every metric without scoring again.

Legend: S samples, K sufficient statistics of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ingle.evaluation.stats import Floats

#: ``rate``: right or wrong. ``ratio``: sum of the first statistic over the sum of the second, seen through an
#: increasing function (every mean is one). ``corpus``: any other function of the sums.
Kind = Literal["rate", "ratio", "corpus"]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How well a model predicts one reference text.

    Attributes:
        nll: Negative log-likelihood of the scored tokens, in nats.
        num_tokens: Tokens scored.
        num_bytes: UTF-8 bytes of the text they spell.
    """

    nll: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one model did with the samples of a task, in their order.

    Attributes:
        answers: Generated texts; empty when no metric reads them.
        likelihoods: Of the first reference of each sample; empty when no metric reads them.
    """

    answers: tuple[str, ...] = ()
    likelihoods: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """One metric of one model.

    Attributes:
        value: The score of the whole set, as the reference implementation gives it.
        per_sample: One score for each sample, in the same unit; the corpus score need not be their mean.
        statistics: Sufficient statistics, float64 [S, K].
        signature: What was computed, to the last option; equal signatures are comparable.
        num_unparsed: Answers in which nothing to compare was found; they score 0.
    """

    value: float
    per_sample: Floats
    statistics: Floats
    signature: str
    num_unparsed: int = 0


class Scorer(Protocol):
    """One metric.

    Attributes:
        name: As in the config and the report.
        kind: Which tests and intervals apply.
        higher_is_better: Direction of improvement.
        reads: Which part of :class:`Outputs` is scored.
    """

    name: str
    kind: Kind
    higher_is_better: bool
    reads: Literal["answers", "likelihoods"]

    def score(self, outputs: Outputs, references: Sequence[Sequence[str]]) -> Scores:
        """Scores the answers, each against its one or more references."""
        ...

    def aggregate(self, totals: Floats) -> Floats:
        """The score that summed statistics [..., K] give: [...]."""
        ...


def mean_of_ratio(totals: Floats) -> Floats:
    """First sum over second sum, 0 where nothing was counted."""
    counts = totals[..., 1]
    return np.divide(totals[..., 0], counts, out=np.zeros_like(counts), where=counts > 0)
