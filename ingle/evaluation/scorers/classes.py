"""Classification: accuracy, F1, Matthews correlation and log loss, equal to scikit-learn's.

Legend: S samples, C labels, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ingle.errors import EvaluationError
from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, mean_scores
from ingle.evaluation.statistics import Floats
from ingle.report.metrics import METRICS
from ingle.wording import nearest

Flags = npt.NDArray[np.bool_]

#: Probabilities are clipped to [EPSILON, 1 - EPSILON], as scikit-learn does.
EPSILON = float(np.finfo(np.float64).eps)

#: What the models of each problem predict, and the metrics that suit them.
_SUITABLE = {
    "single": ("one label per text", "accuracy, f1_macro, matthews, log_loss or roc_auc"),
    "multi": ("several labels per text", "f1_micro, f1_macro, accuracy, log_loss or roc_auc"),
    "regression": ("numbers", "pearson, spearman or mse"),
}


class Accuracy(Scorer):
    """Share of samples with the right label; of several labels per sample, all must be right."""

    metric = METRICS["accuracy"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores 1 where the label is right, else 0."""
        predicted, true = read_labels(self, outputs, references)
        return mean_scores((predicted == true).all(1), f"problem:{outputs.problem}")


class ClassF1(Scorer):
    """F1 of the labels: their mean (macro), that of all decisions together (micro), or weighted by frequency.

    If a sample has one label, labels that are in no reference and no prediction are left out; resamples keep that
    choice. If it has several, all labels of the model count. Both are as in scikit-learn.

    Source: Opitz and Burst 2019, arXiv 1911.03347 (macro F1 as the mean of F1 scores).
    """

    def __init__(self, average: Literal["macro", "micro", "weighted"]) -> None:
        self.metric = METRICS[f"f1_{average}"]
        self._average = average

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores all labels; a sample's score is the F1 of its own labels, right or wrong if it has one."""
        predicted, true = read_labels(self, outputs, references)
        counts = count_labels(predicted, true)
        right_S, predicted_S, true_S = (part.sum(1) for part in np.split(counts, 3, axis=1))
        counts_all = outputs.problem == "multi"
        statistics = np.concatenate((counts, np.full((len(counts), 1), float(counts_all))), axis=1)
        value = float(self.replicate(statistics, np.ones((1, len(statistics))))[0])
        signature = f"average:{self._average}|labels:{'all' if counts_all else 'present'}"
        return Scores(value, f1(right_S, predicted_S, true_S, empty=1.0), statistics, signature)

    def replicate(self, statistics_SK: Floats, times_RS: Floats) -> Floats:
        """Returns the F1 of resamples; the last statistic is 1 if all labels count."""
        counts_SK, counts_all = statistics_SK[:, :-1], statistics_SK[:, -1].any()
        right_RC, predicted_RC, true_RC = np.split(times_RS @ counts_SK, 3, axis=1)
        if self._average == "micro":
            return f1(right_RC.sum(1), predicted_RC.sum(1), true_RC.sum(1))
        f1_RC = f1(right_RC, predicted_RC, true_RC)
        if self._average == "weighted":
            return ratio((f1_RC * true_RC).sum(1), true_RC.sum(1))
        _, was_predicted, was_true = np.split(counts_SK.any(0), 3)
        present_C = was_predicted | was_true | counts_all
        return f1_RC[:, present_C].mean(1) if present_C.any() else np.zeros(len(f1_RC))


class Matthews(Scorer):
    """Matthews correlation coefficient, -1 to 1; for several classes R_K. 0 where it is not defined.

    Source: Gorodkin 2004, Comput. Biol. Chem. 28:367, equation 8.
    """

    metric = METRICS["matthews"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores all samples; a sample's score is 1 if its label is right, else 0."""
        _require(self, outputs, "single")
        predicted, true = read_labels(self, outputs, references)
        statistics = count_labels(predicted, true)
        value = float(self.aggregate(statistics.sum(0)[None])[0])
        return Scores(value, (predicted == true).all(1).astype(np.float64), statistics, "multiclass:R_K")

    def aggregate(self, totals: Floats) -> Floats:
        """Returns the coefficients of summed (right, predicted, true) per class."""
        right, predicted, true = np.split(totals, 3, axis=-1)
        count = true.sum(-1)
        covariance = right.sum(-1) * count - (predicted * true).sum(-1)
        spread = (count**2 - (predicted**2).sum(-1)) * (count**2 - (true**2).sum(-1))
        return ratio(covariance, np.sqrt(np.maximum(spread, 0.0)))


class LogLoss(Scorer):
    """Mean negative log-likelihood of the labels, in nats; of several labels per sample, the mean over all labels."""

    metric = METRICS["log_loss"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the log-probabilities of the predictions."""
        _, true_SC = read_labels(self, outputs, references)
        logps_SC = read_logps(self, outputs)
        probabilities_SC = np.clip(np.exp(logps_SC), EPSILON, 1.0 - EPSILON)
        # A small probability keeps its digits as a logarithm: exp and log would round it.
        logps_SC = np.clip(logps_SC, np.log(EPSILON), np.log1p(-EPSILON))
        if outputs.problem == "multi":
            losses = -np.where(true_SC, logps_SC, np.log1p(-probabilities_SC)).mean(1)
        else:
            losses = -logps_SC[true_SC]
        return mean_scores(losses, f"problem:{outputs.problem}|eps:2^-52")


def read_labels(scorer: Scorer, outputs: Outputs, references: References) -> tuple[Flags, Flags]:
    """Returns which labels are predicted and which are true, both bool [S, C].

    Raises:
        EvaluationError: The model predicts no labels, or a reference is not one of them.
    """
    _require(scorer, outputs, "single", "multi")
    only_first = outputs.problem == "single"
    chosen = [prediction.labels for prediction in outputs.predictions]
    true = [targets[:1] if only_first else targets for targets in references]
    return mark_labels(chosen, outputs.label_names), mark_labels(true, outputs.label_names)


def read_logps(scorer: Scorer, outputs: Outputs) -> Floats:
    """Returns the log-probability of each label, [S, C].

    Raises:
        EvaluationError: A prediction lacks them.
    """
    scores = [prediction.scores for prediction in outputs.predictions]
    if any(len(row) != len(outputs.label_names) for row in scores):
        raise EvaluationError(
            f"{scorer.metric.title} needs the probability of every label, which these predictions lack.",
            where="evaluate.metrics",
            fix="use accuracy, f1_macro or matthews",
        )
    return np.array(scores, dtype=np.float64)


def mark_labels(chosen: Sequence[Sequence[str]], names: Sequence[str]) -> Flags:
    """Returns which labels are chosen, bool [S, C].

    Raises:
        EvaluationError: A label is not among the names.
    """
    columns = {name: column for column, name in enumerate(names)}
    marked_SC = np.zeros((len(chosen), len(names)), dtype=np.bool_)
    for row, labels in enumerate(chosen):
        for label in labels:
            if label not in columns:
                guess = nearest(label, names)
                raise EvaluationError(
                    f"The label {label!r} is not one of the model's.",
                    where="evaluate.sources",
                    why=f"it knows {', '.join(map(repr, names[:12]))}{' and more' if len(names) > 12 else ''}",
                    fix=f"did you mean {guess!r}?" if guess else "correct the label, or remove the row",
                )
            marked_SC[row, columns[label]] = True
    return marked_SC


def _require(scorer: Scorer, outputs: Outputs, *problems: str) -> None:
    if not outputs.label_names and outputs.problem != "regression":
        raise EvaluationError(
            f"{scorer.metric.title.capitalize()} needs a model that predicts labels; this one predicts none.",
            where="evaluate.metrics",
            fix="use a model trained with objective.kind: classify, or other metrics",
        )
    found, fix = _SUITABLE[outputs.problem]
    if outputs.problem not in problems:
        raise EvaluationError(
            f"{scorer.metric.title.capitalize()} does not suit this model: it predicts {found}.",
            where="evaluate.metrics",
            fix=f"use {fix}",
        )


def count_labels(predicted_SC: Flags, true_SC: Flags) -> Floats:
    """Returns (right, predicted, true) per label of each sample, [S, 3 C]."""
    return np.concatenate((predicted_SC & true_SC, predicted_SC, true_SC), axis=1).astype(np.float64)


def f1(right: Floats, predicted: Floats, true: Floats, empty: float = 0.0) -> Floats:
    """Returns ``2 right / (predicted + true)``; ``empty`` where nothing is predicted and nothing is true."""
    return ratio(2.0 * right, predicted + true, empty)


def ratio(numerator: Floats, denominator: Floats, empty: float = 0.0) -> Floats:
    """Returns the quotient; ``empty`` where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, empty), where=denominator > 0)
