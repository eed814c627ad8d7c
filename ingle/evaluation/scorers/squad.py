"""SQuAD's exact match and F1 of extracted or generated answers, equal to the official script of version 2.0.

An empty reference means that the context has no answer; the right answer is then empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, mean_scores
from ingle.report.metrics import METRICS
from ingle.rewards.matching import normalize

_SIGNATURE = "squad:2.0|case:lower|punctuation:no|articles:no|refs:max"


class SquadExactMatch(Scorer):
    """Share of answers that equal a reference after normalization.

    Source: Rajpurkar et al. 2018, arXiv 1806.03822, section 5.
    """

    metric = METRICS["squad_em"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores 1 where the answer equals any reference, else 0."""
        pairs = zip(map(normalize, outputs.answers), references, strict=True)
        return mean_scores([answer in _normalized(targets) for answer, targets in pairs], _SIGNATURE)


class SquadF1(Scorer):
    """Mean F1 of the words of answer and reference, without their order; of several references the best one counts."""

    metric = METRICS["squad_f1"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores each answer against its closest reference."""
        pairs = zip(map(normalize, outputs.answers), references, strict=True)
        best = [max(_word_f1(answer, target) for target in _normalized(targets)) for answer, targets in pairs]
        return mean_scores(np.array(best), _SIGNATURE)


def _normalized(targets: Sequence[str]) -> list[str]:
    """Returns the references; those of which nothing is left count only if nothing is left of all."""
    return [text for text in map(normalize, targets) if text] or [""]


def _word_f1(answer: str, target: str) -> float:
    words, target_words = answer.split(), target.split()
    if not words or not target_words:
        return float(words == target_words)
    common = sum((Counter(words) & Counter(target_words)).values())
    return 2.0 * common / (len(words) + len(target_words))
