"""The door to sacrebleu: references of unequal number, and sufficient statistics of each segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from sacrebleu.metrics.base import Metric

from ingle.evaluation.stats import Floats


def streams(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """References turned from one list a segment into sacrebleu's one list a stream.

    A segment with fewer references than others has ``None`` in the last streams, which sacrebleu leaves out; an
    empty string would count as a reference of length 0 and move BLEU's closest reference length.
    """
    longest = max(len(targets) for targets in references)
    padded = [[targets[k] if k < len(targets) else None for targets in references] for k in range(longest)]
    return cast("list[list[str]]", padded)  # sacrebleu takes None, but its annotations do not say so


def segment_statistics(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """Match counts of each segment, float64 [S, K]; integers, so their sums are exact.

    sacrebleu's own significance tests read them by this same method; it has no public one.
    """
    return np.array(metric._extract_corpus_statistics(answers, streams(references)), dtype=np.float64)


def segment_scores(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """Score of each segment on its own, [S]."""
    pairs = zip(answers, references, strict=True)
    return np.array([metric.sentence_score(answer, list(targets)).score for answer, targets in pairs])
