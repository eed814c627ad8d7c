"""Token classification: F1 of entities as seqeval computes it, and the share of right tags.

References hold the tags of all words, separated by spaces.

Legend: S samples, E types of entities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from ingle.errors import EvaluationError
from ingle.evaluation.scorers.classes import f1
from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, ratio_scores
from ingle.evaluation.statistics import Floats
from ingle.evaluation.tag_schemes import Entity, find_entities, type_of
from ingle.report.metrics import METRICS


class EntityF1(Scorer):
    """F1 of entities, of which the type and all words must be right: over all entities, or the mean over types.

    The mean leaves out types that are in no reference and no prediction; resamples keep that choice.

    Source: Tjong Kim Sang and De Meulder 2003, CoNLL (section 2.5); Nakayama 2018, seqeval.

    Args:
        average: ``micro`` for all entities together, ``macro`` for the mean over types.
        scheme: How tags are read, see :func:`ingle.evaluation.tag_schemes.find_entities`.
    """

    def __init__(self, average: Literal["micro", "macro"], scheme: str = "auto") -> None:
        self.metric = METRICS["entity_f1" if average == "micro" else "entity_f1_macro"]
        self._average = average
        self._scheme = scheme

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores all sentences; a sentence without entities scores 1 if none is predicted."""
        pairs = [
            (set(find_entities(predicted, self._scheme)), set(find_entities(true, self._scheme)))
            for predicted, true in _read_tags(self, outputs, references)
        ]
        counts = np.array([[len(found & true), len(found), len(true)] for found, true in pairs], dtype=np.float64)
        statistics = counts
        if self._average == "macro":
            known = set(types_of(outputs.label_names))
            known |= {entity.kind for found, true in pairs for entity in found | true}
            statistics = count_by_type(pairs, sorted(known))
        value = float(self.replicate(statistics, np.ones((1, len(statistics))))[0])
        signature = f"average:{self._average}|scheme:{self._scheme}"
        right_S, predicted_S, true_S = counts.T
        return Scores(value, f1(right_S, predicted_S, true_S, empty=1.0), statistics, signature)

    def replicate(self, statistics_SK: Floats, times_RS: Floats) -> Floats:
        """Returns the F1 of resamples."""
        right_RE, predicted_RE, true_RE = np.split(times_RS @ statistics_SK, 3, axis=1)
        f1_RE = f1(right_RE, predicted_RE, true_RE)
        _, predicted_E, true_E = np.split(statistics_SK.sum(0), 3)
        present_E = predicted_E + true_E > 0
        return f1_RE[:, present_E].mean(1) if present_E.any() else np.zeros(len(f1_RE))


class TagAccuracy(Scorer):
    """Share of words with the right tag."""

    metric = METRICS["tag_accuracy"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the tags; a per-sample value is the share of that sentence."""
        statistics = [
            (sum(one == other for one, other in zip(predicted, true, strict=True)), len(true))
            for predicted, true in _read_tags(self, outputs, references)
        ]
        return ratio_scores(self, np.array(statistics, dtype=np.float64), "weight:words")


def _read_tags(
    scorer: Scorer, outputs: Outputs, references: References
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Yields predicted and true tags of each sentence.

    Raises:
        EvaluationError: They have different numbers of words.
    """
    for place, (prediction, targets) in enumerate(zip(outputs.predictions, references, strict=True), start=1):
        true = tuple(targets[0].split())
        if len(true) != len(prediction.labels):
            raise EvaluationError(
                f"{scorer.metric.title.capitalize()} needs a tag for every word.",
                where="evaluate.sources",
                why=f"sample {place} has {len(true)} tags; {len(prediction.labels)} were predicted",
                fix="give every row as many tags as words; metrics of tags need a model that predicts tags",
            )
        yield prediction.labels, true


def types_of(tags: Iterable[str]) -> tuple[str, ...]:
    """Returns the types of entities that tags name, sorted."""
    return tuple(sorted({type_of(tag) for tag in tags} - {"_"}))


def count_by_type(pairs: list[tuple[set[Entity], set[Entity]]], types: list[str]) -> Floats:
    """Returns (right, predicted, true) per type of each sentence, [S, 3 E]."""
    rows = []
    for found, true in pairs:
        parts = [Counter(entity.kind for entity in part) for part in (found & true, found, true)]
        rows.append([part[kind] for part in parts for kind in types])
    return np.array(rows, dtype=np.float64)
