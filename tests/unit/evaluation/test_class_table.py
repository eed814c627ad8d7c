"""Figures of each label against scikit-learn, and the worst errors."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from ingle.config import Source, TaskConfig
from ingle.evaluation.class_table import find_worst, tabulate_classes
from ingle.evaluation.scorers import Outputs, Prediction, make_scorer
from ingle.evaluation.tasks.task_result import SampleText, TaskResult

NAMES = ("a", "b", "c")


def make_result(true: list[str], predicted: list[str], sure: list[float]) -> TaskResult:
    samples = tuple(SampleText(f"x:{i}", "text", (label,)) for i, label in enumerate(true))
    predictions = tuple(Prediction((label,), (score,) * 3) for label, score in zip(predicted, sure, strict=True))
    return TaskResult(samples, Outputs(predictions=predictions, label_names=NAMES))


@pytest.mark.parametrize("seed", range(5))
def test_figures_and_confusion_are_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, base, tuned = (rng.choice(NAMES, 40, p=p).tolist() for p in ([0.5, 0.3, 0.2], [1.0, 0, 0], [0.4, 0.4, 0.2]))
    results = [make_result(true, each, [-1.0] * 40) for each in (base, tuned)]
    task = TaskConfig(sources=(Source(path="x"),), metrics=("accuracy",))
    table = tabulate_classes(*results, task)
    assert table is not None
    assert table.confusion == tuple(map(tuple, confusion_matrix(true, tuned, labels=NAMES).tolist()))
    for side, predicted in (("base", base), ("tuned", tuned)):
        expected = precision_recall_fscore_support(true, predicted, labels=NAMES, zero_division=0)
        for name, values in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            found = [getattr(getattr(row, name), side) for row in table.rows]
            assert found == pytest.approx(values.tolist(), rel=1e-12)
        assert [row.support for row in table.rows] == expected[3].tolist()


def test_the_worst_errors_are_the_surest_mistakes() -> None:
    result = make_result(["a", "a", "b", "c"], ["a", "b", "a", "a"], [-0.1, -0.5, -0.01, -0.9])
    scorer = make_scorer("accuracy", TaskConfig(sources=(Source(path="x"),), metrics=("accuracy",)))
    scores = scorer.score(result.outputs, result.references)
    assert find_worst(result, scores, higher_is_better=True, count=2) == (2, 1)
    assert find_worst(result, scores, higher_is_better=True, count=9) == (2, 1, 3)
