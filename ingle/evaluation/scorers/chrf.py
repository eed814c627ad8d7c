"""chrF as sacrebleu computes it: F-score of character n-grams, white space left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import sacrebleu

from ingle.evaluation.scorers.base import Kind, Outputs, Scores
from ingle.evaluation.scorers.sacre import segment_scores, segment_statistics, streams
from ingle.evaluation.stats import Floats

_BETA_SQUARED = 4.0


class Chrf:
    """Corpus chrF2, 0 to 100; the score of one sample is its own chrF2.

    Source: Popović 2015 (WMT, section 2); Post 2018, arXiv 1804.08771.
    """

    name = "chrf"
    kind: Kind = "corpus"
    higher_is_better = True
    reads: Literal["answers", "likelihoods"] = "answers"

    def score(self, outputs: Outputs, references: Sequence[Sequence[str]]) -> Scores:
        """Scores the answers; the value is sacrebleu's to the last digit."""
        metric = sacrebleu.CHRF()
        return Scores(
            value=float(metric.corpus_score(outputs.answers, streams(references)).score),
            statistics=segment_statistics(metric, outputs.answers, references),
            signature=str(metric.get_signature()),
            per_sample=segment_scores(sacrebleu.CHRF(), outputs.answers, references),
        )

    def aggregate(self, totals: Floats) -> Floats:
        """The chrF of summed statistics (6 orders x answer, reference and matching n-grams).

        Precision and recall are averaged over the orders that both sides have.
        """
        counts = totals.reshape(*totals.shape[:-1], -1, 3)
        answer, reference, matching = counts[..., 0], counts[..., 1], counts[..., 2]
        both = (answer > 0) & (reference > 0)
        num_orders = np.maximum(both.sum(axis=-1), 1)
        precision = np.where(both, matching / np.maximum(answer, 1), 0.0).sum(axis=-1) / num_orders
        recall = np.where(both, matching / np.maximum(reference, 1), 0.0).sum(axis=-1) / num_orders
        denominator = _BETA_SQUARED * precision + recall
        score = (1 + _BETA_SQUARED) * precision * recall / np.where(denominator > 0, denominator, 1.0)
        return np.where(denominator > 0, 100.0 * score, 0.0)
