"""How well each label is predicted, what is taken for what, and the samples with the worst errors.

Legend: S samples, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingle.config.evaluate import TaskConfig
from ingle.evaluation.decoding.tags import marks_entities
from ingle.evaluation.scorers import Scores
from ingle.evaluation.scorers.classes import f1, mark_labels, ratio
from ingle.evaluation.scorers.entities import count_by_type, types_of
from ingle.evaluation.statistics import Floats
from ingle.evaluation.tag_schemes import find_entities
from ingle.evaluation.tasks.task_result import TaskResult
from ingle.report.results import ClassFigures, ClassTable, Pair

#: Larger confusion matrices cannot be read.
MAX_CONFUSED = 20
_TAG_METRICS = {"tag_accuracy", "entity_f1", "entity_f1_macro"}


def tabulate_classes(base: TaskResult, tuned: TaskResult, task: TaskConfig) -> ClassTable | None:
    """Returns precision, recall and F1 of each label, or of each type of entity; None without labels.

    Args:
        base: Outputs of the baseline.
        tuned: Outputs of the trained model.
        task: Their task.
    """
    names = tuned.outputs.label_names
    if not names or not tuned.outputs.predictions:
        return None
    if _TAG_METRICS & set(task.metrics or ()):
        if not marks_entities(names):
            return None
        types = types_of(names)
        before, after = (_count_entities(result, types, task.tag_scheme) for result in (base, tuned))
        return _table(types, before, after)
    confused = tuned.outputs.problem == "single" and len(names) <= MAX_CONFUSED
    return _table(names, _count_labels(base), _count_labels(tuned), _confuse(tuned) if confused else None)


def find_worst(tuned: TaskResult, scores: Scores, *, higher_is_better: bool, count: int) -> tuple[int, ...]:
    """Returns the samples with the worst scores; of equal ones, those with the most confident predictions first.

    Args:
        tuned: Outputs of the trained model.
        scores: Its scores by the headline metric.
        higher_is_better: Direction of the metric.
        count: Number of samples.
    """
    values_S = scores.per_sample if higher_is_better else -scores.per_sample
    confidence = [max(each.scores, default=0.0) for each in tuned.outputs.predictions] or [0.0] * len(values_S)
    order = np.lexsort((-np.array(confidence), values_S))
    perfect = values_S.max() if len(values_S) else 0.0
    return tuple(int(index) for index in order[:count] if values_S[index] < perfect)


def _count_labels(result: TaskResult) -> Floats:
    """Returns how often each label is right, predicted and true, [3, C]."""
    names, is_single = result.outputs.label_names, result.outputs.problem == "single"
    true = [targets[:1] if is_single else targets for targets in result.references]
    predicted_SC = mark_labels([each.labels for each in result.outputs.predictions], names)
    true_SC = mark_labels(true, names)
    return np.stack([(predicted_SC & true_SC).sum(0), predicted_SC.sum(0), true_SC.sum(0)]).astype(np.float64)


def _count_entities(result: TaskResult, types: Sequence[str], scheme: str) -> Floats:
    """Returns how often entities of each type are right, predicted and true, [3, C]."""
    pairs = [
        (set(find_entities(prediction.labels, scheme)), set(find_entities(targets[0].split(), scheme)))
        for prediction, targets in zip(result.outputs.predictions, result.references, strict=True)
    ]
    counts: Floats = count_by_type(pairs, list(types)).sum(0).reshape(3, -1)
    return counts


def _confuse(result: TaskResult) -> tuple[tuple[int, ...], ...]:
    """Returns how many samples of each true label (rows) have each predicted label (columns)."""
    names = result.outputs.label_names
    predicted_SC = mark_labels([each.labels for each in result.outputs.predictions], names).astype(np.int64)
    true_SC = mark_labels([targets[:1] for targets in result.references], names).astype(np.int64)
    return tuple(tuple(row) for row in (true_SC.T @ predicted_SC).tolist())


def _table(
    names: Sequence[str], base: Floats, tuned: Floats, confusion: tuple[tuple[int, ...], ...] | None = None
) -> ClassTable:
    figures = [
        (ratio(right, predicted), ratio(right, true), f1(right, predicted, true))
        for right, predicted, true in (base, tuned)
    ]
    pairs = [
        [Pair(float(one), float(other)) for one, other in zip(*each, strict=True)]
        for each in zip(*figures, strict=True)
    ]
    rows = tuple(
        ClassFigures(name=name, support=int(support), precision=precision, recall=recall, f1=score)
        for name, support, precision, recall, score in zip(names, tuned[2], *pairs, strict=True)
    )
    return ClassTable(rows=rows, confusion=confusion)
