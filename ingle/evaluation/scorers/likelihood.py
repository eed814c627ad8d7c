"""Perplexity and bits per byte: how well a model predicts the first reference, token by token.

Both divide the negative log-likelihood of the whole set by its whole length, so a long text weighs more than a
short one and no text's own ratio is averaged.  Perplexities compare only under one tokenizer; bits per byte
compare under any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ingle.evaluation.scorers.base import Kind, Outputs, Scores, mean_of_ratio
from ingle.evaluation.stats import Floats

#: Beyond this a model is hopeless, and its perplexity would outgrow what a variance of floats can hold.
_MAX_NATS = 100.0


class Perplexity:
    """``exp(-sum of log-likelihoods / tokens)``, at most ``exp(100)``."""

    name = "perplexity"
    kind: Kind = "ratio"
    higher_is_better = False
    reads: Literal["answers", "likelihoods"] = "likelihoods"

    def score(self, outputs: Outputs, references: Sequence[Sequence[str]]) -> Scores:
        """Scores the likelihoods; the per-sample value is that text's own perplexity."""
        statistics = np.array([(text.nll, text.num_tokens) for text in outputs.likelihoods], dtype=np.float64)
        return _scores(self, statistics, "weight:tokens|reference:first")

    def aggregate(self, totals: Floats) -> Floats:
        """Perplexity of summed (nats, tokens)."""
        return np.asarray(np.exp(np.minimum(mean_of_ratio(totals), _MAX_NATS)))


class BitsPerByte:
    """``-sum of log-likelihoods / (bytes x ln 2)``."""

    name = "bits_per_byte"
    kind: Kind = "ratio"
    higher_is_better = False
    reads: Literal["answers", "likelihoods"] = "likelihoods"

    def score(self, outputs: Outputs, references: Sequence[Sequence[str]]) -> Scores:
        """Scores the likelihoods; the per-sample value is that text's own ratio."""
        statistics = np.array([(text.nll, text.num_bytes) for text in outputs.likelihoods], dtype=np.float64)
        return _scores(self, statistics, "weight:bytes|reference:first")

    def aggregate(self, totals: Floats) -> Floats:
        """Bits per byte of summed (nats, bytes)."""
        return mean_of_ratio(totals) / math.log(2)


def _scores(scorer: Perplexity | BitsPerByte, statistics_SK: Floats, signature: str) -> Scores:
    return Scores(
        value=float(scorer.aggregate(statistics_SK.sum(0)[None, :])[0]),
        per_sample=scorer.aggregate(statistics_SK),
        statistics=statistics_SK,
        signature=signature,
    )
