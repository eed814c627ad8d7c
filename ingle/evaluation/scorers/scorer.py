"""The interface of scorers: outputs in, one row of statistics per sample out.

The score of most metrics is a function of the column sums of the statistics: plain means (score, 1), ratios (negative
log-likelihood, bytes) and corpus scores (n-gram counts). Metrics of ranks need the rows themselves. Both can score a
sample that counts several times or not at all, so every test and interval of :mod:`ingle.evaluation.statistics` works
on every metric without running the model again.

Legend: S samples, K statistics of a sample, R resamples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ingle.evaluation.statistics import Floats
from ingle.report.metrics import Metric

#: Accepted answers of each sample; for several labels per sample, all labels that are true.
References = Sequence[Sequence[str]]

#: What a classifier predicts: one label, any number of labels, or a number.
Problem = Literal["single", "multi", "regression"]


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
class Prediction:
    """Prediction of a task head for one sample.

    Attributes:
        labels: The chosen label, or labels; a tag per word in token classification; empty for a number.
        scores: Natural logarithm of the probability of each label name, in their order; a number's value; in token
            classification, the logarithm of the probability of each chosen tag.
        text: The prediction as it is shown; empty to show the labels.
    """

    labels: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    text: str = ""

    def __str__(self) -> str:
        """The prediction as it is shown."""
        return self.text or " ".join(self.labels or (f"{score:.4g}" for score in self.scores))


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """Predictions of the masked tokens of one sample.

    Attributes:
        nll: Negative log-likelihood of the original tokens, in nats.
        num_right: Tokens whose most likely prediction is the original.
        num_tokens: Number of masked tokens.
    """

    nll: float
    num_right: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """Outputs of one model for the samples of a task, in their order. What no metric reads is empty.

    Attributes:
        answers: Answers as text: generated, or found in a context.
        rewards: Sum of the rewards of each answer; NaN for none.
        likelihoods: Likelihood of each sample's first reference.
        predictions: Predictions of a task head.
        masked: Predictions of masked tokens.
        label_names: Names of the labels, or tags, that the model can predict.
        problem: What the predictions are.
    """

    answers: tuple[str, ...] = ()
    likelihoods: tuple[Likelihood, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    masked: tuple[MaskedTokens, ...] = ()
    label_names: tuple[str, ...] = ()
    problem: Problem = "single"
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """One metric of one model.

    Attributes:
        value: Score of the task, as the reference implementation computes it.
        per_sample: Score of each sample, [S]; ``value`` need not be their mean.
        statistics: What the score is a function of, float64 [S, K].
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

    metric: Metric

    @abstractmethod
    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores all samples, each against one or more references."""

    def replicate(self, statistics_SK: Floats, times_RS: Floats) -> Floats:
        """Returns the scores [R] of resamples in which each sample counts as often as ``times_RS`` says.

        Args:
            statistics_SK: Statistics of the samples; those of two models one after the other are also allowed.
            times_RS: How often each sample counts.
        """
        return self.aggregate(times_RS @ statistics_SK)

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the scores [...] of summed statistics [..., K]: the first over the second, or 0 for a count of 0."""
        counts = totals[..., 1]
        return np.divide(totals[..., 0], counts, out=np.zeros_like(counts), where=counts > 0)


def ratio_scores(scorer: Scorer, statistics_SK: Floats, signature: str) -> Scores:
    """Returns scores whose value, and whose value per sample, is the aggregate of the statistics."""
    value = float(scorer.aggregate(statistics_SK.sum(0)[None, :])[0])
    return Scores(value, scorer.aggregate(statistics_SK), statistics_SK, signature)


def mean_scores(per_sample: Sequence[float] | Floats, signature: str, num_unparsed: int = 0) -> Scores:
    """Returns scores whose value is the mean over the samples."""
    values = np.asarray(per_sample, dtype=np.float64)
    statistics = np.stack((values, np.ones_like(values)), axis=1)
    return Scores(float(values.mean()), values, statistics, signature, num_unparsed)
