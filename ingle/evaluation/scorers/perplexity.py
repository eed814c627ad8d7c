"""Perplexity and bits per byte of each sample's first reference.

Both divide the negative log-likelihood of the task by its length, so longer texts weigh more; ratios of single texts
are not averaged. Perplexities can be compared only under one tokenizer, bits per byte under any.
"""

from __future__ import annotations

import math

import numpy as np

from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, ratio_scores
from ingle.evaluation.statistics import Floats
from ingle.report.metrics import METRICS

#: Limit of the mean in nats: the variance of larger perplexities overflows.
MAX_NATS = 100.0


class Perplexity(Scorer):
    """``exp(-sum of log-likelihoods / tokens)``, at most ``exp(100)``."""

    metric = METRICS["perplexity"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the likelihoods; a per-sample value is the perplexity of that text."""
        statistics = np.array([(text.nll, text.num_tokens) for text in outputs.likelihoods], dtype=np.float64)
        return ratio_scores(self, statistics, "weight:tokens|reference:first")

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the perplexity of summed (nats, tokens)."""
        return np.asarray(np.exp(np.minimum(super().aggregate(totals), MAX_NATS)))


class BitsPerByte(Scorer):
    """``-sum of log-likelihoods / (bytes x ln 2)``."""

    metric = METRICS["bits_per_byte"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the likelihoods; a per-sample value is the ratio of that text."""
        statistics = np.array([(text.nll, text.num_bytes) for text in outputs.likelihoods], dtype=np.float64)
        return ratio_scores(self, statistics, "weight:bytes|reference:first")

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the bits per byte of summed (nats, bytes)."""
        return super().aggregate(totals) / math.log(2)
