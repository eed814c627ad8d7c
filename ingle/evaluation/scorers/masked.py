"""Masked language modelling: accuracy and perplexity of the masked tokens.

The masks are fixed by the seed of the task, so two models predict the same tokens.
"""

from __future__ import annotations

import numpy as np

from ingle.evaluation.scorers.perplexity import MAX_NATS
from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, ratio_scores
from ingle.evaluation.statistics import Floats
from ingle.report.metrics import METRICS


class MaskedAccuracy(Scorer):
    """Share of masked tokens whose most likely prediction is the original."""

    metric = METRICS["masked_accuracy"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the masked tokens; a text without any scores 0."""
        statistics = np.array([(text.num_right, text.num_tokens) for text in outputs.masked], dtype=np.float64)
        return ratio_scores(self, statistics, "weight:tokens|masks:fixed")


class MaskedPerplexity(Scorer):
    """``exp(-sum of log-likelihoods / masked tokens)``, at most ``exp(100)``."""

    metric = METRICS["masked_perplexity"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the masked tokens; a per-sample value is the perplexity of that text."""
        statistics = np.array([(text.nll, text.num_tokens) for text in outputs.masked], dtype=np.float64)
        return ratio_scores(self, statistics, "weight:tokens|masks:fixed")

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the perplexity of summed (nats, masked tokens)."""
        return np.asarray(np.exp(np.minimum(super().aggregate(totals), MAX_NATS)))
