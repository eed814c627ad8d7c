"""Ranks and numbers: ROC-AUC, Pearson and Spearman correlation, mean squared error; equal to scikit-learn and scipy.

A rank depends on all samples, so these scores are no functions of sums. They are functions of how often each sample
counts: a sample that counts twice has two places in the order.

Legend: S samples, C labels, R resamples, G values that differ.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ingle.errors import EvaluationError
from ingle.evaluation.scorers.classes import Flags, ratio, read_labels, read_logps
from ingle.evaluation.scorers.scorer import Outputs, References, Scorer, Scores, mean_scores
from ingle.evaluation.statistics import Floats
from ingle.report.metrics import METRICS

#: Multiplicities scored at a time, so that the intermediate results stay in the cache.
_BLOCK = 1 << 20


class RocAuc(Scorer):
    """Probability that a sample with the label ranks above one without; the mean over labels if there are several.

    Of two classes, the second is the positive one. More classes are scored one against the rest. Labels that all
    samples have, or none, are left out; without any other label the score is 0.5.

    Source: Hanley and McNeil 1982, Radiology 143:29.
    """

    metric = METRICS["roc_auc"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the log-probabilities; a sample's score is the share of samples on the right side of it."""
        _, true_SC = read_labels(self, outputs, references)
        logps_SC = read_logps(self, outputs)
        if outputs.problem == "single" and len(outputs.label_names) == 2:
            logps_SC, true_SC = logps_SC[:, 1:], true_SC[:, 1:]
        statistics = np.concatenate((logps_SC, true_SC.astype(np.float64)), axis=1)
        value = float(self.replicate(statistics, np.ones((1, len(statistics))))[0])
        kept_C = _is_mixed(true_SC)
        placements = [_placements(*pair) for pair in zip(logps_SC.T[kept_C], true_SC.T[kept_C], strict=True)]
        per_sample = np.mean(placements, axis=0) if placements else np.full(len(true_SC), 0.5)
        return Scores(value, per_sample, statistics, f"average:macro|problem:{outputs.problem}")

    def replicate(self, statistics_SK: Floats, times_RS: Floats) -> Floats:
        """Returns the areas of resamples; 0.5 where a resample has one side only."""
        scores_SC, true_SC = np.split(statistics_SK, 2, axis=1)
        is_true_SC = true_SC > 0
        kept = np.flatnonzero(_is_mixed(is_true_SC))
        if not len(kept):
            return np.full(len(times_RS), 0.5)

        def mean_area(times: Floats) -> Floats:
            return np.asarray(np.mean([_auc(scores_SC[:, c], is_true_SC[:, c], times) for c in kept], axis=0))

        return _in_blocks(times_RS, mean_area)


class Pearson(Scorer):
    """Pearson's correlation coefficient of predictions and references; 0 where one of them does not vary."""

    metric = METRICS["pearson"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the numbers; the mean of the samples' scores is the coefficient."""
        statistics = np.stack(read_numbers(self, outputs, references), axis=1)
        value = float(self.replicate(statistics, np.ones((1, len(statistics))))[0])
        return Scores(value, _agreement(*statistics.T), statistics, "reference:first")

    def replicate(self, statistics_SK: Floats, times_RS: Floats) -> Floats:
        """Returns the coefficients of resamples."""
        x_S, y_S = statistics_SK.T
        x_S, y_S = x_S - x_S.mean(), y_S - y_S.mean()  # sums of centered values do not cancel
        x_S, y_S = (values / (np.abs(values).max() or 1.0) for values in (x_S, y_S))
        moments_S5 = np.stack((x_S, y_S, x_S * x_S, y_S * y_S, x_S * y_S), axis=1)
        count, sums = times_RS.sum(1), times_RS @ moments_S5
        x, y, xx, yy, xy = sums.T
        spread = np.maximum(xx - x * x / count, 0.0) * np.maximum(yy - y * y / count, 0.0)
        # A resample of equal values leaves a rounding error instead of 0.
        return ratio(np.where(spread > 1e-24 * count**2, xy - x * y / count, 0.0), np.sqrt(spread))


class Spearman(Scorer):
    """Spearman's rank correlation: Pearson's of the ranks, where equal values share the mean of their ranks."""

    metric = METRICS["spearman"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the order; the mean of the samples' scores is the coefficient."""
        statistics = np.stack(read_numbers(self, outputs, references), axis=1)
        once = np.ones((1, len(statistics)))
        ranks = [_midranks(values, once)[0] for values in statistics.T]
        return Scores(
            float(self.replicate(statistics, once)[0]), _agreement(*ranks), statistics, "reference:first|ties:mean"
        )

    def replicate(self, statistics_SK: Floats, times_RS: Floats) -> Floats:
        """Returns the coefficients of resamples."""
        x_S, y_S = statistics_SK.T
        return _in_blocks(times_RS, lambda times: _spearman(x_S, y_S, times))


class MeanSquaredError(Scorer):
    """Mean of the squared differences of predictions and references."""

    metric = METRICS["mse"]

    def score(self, outputs: Outputs, references: References) -> Scores:
        """Scores the squared error of each sample."""
        predicted, true = read_numbers(self, outputs, references)
        return mean_scores((predicted - true) ** 2, "reference:first")


def read_numbers(scorer: Scorer, outputs: Outputs, references: References) -> tuple[Floats, Floats]:
    """Returns predicted and true numbers, both [S].

    Raises:
        EvaluationError: The model predicts labels, or a reference is not a number.
    """
    if outputs.problem != "regression":
        raise EvaluationError(
            f"{scorer.metric.title.capitalize()} does not suit this model: it predicts labels, not numbers.",
            where="evaluate.metrics",
            fix="use accuracy, f1_macro, matthews, log_loss or roc_auc",
        )
    true = []
    for targets in references:
        try:
            true.append(float(targets[0]))
        except (ValueError, IndexError) as error:
            raise EvaluationError(
                f"The reference {targets[0] if targets else ''!r} is not a number.",
                where="evaluate.sources",
                why="the model was trained to predict numbers",
                fix="correct the row, or remove it",
            ) from error
    return np.array([prediction.scores[0] for prediction in outputs.predictions], dtype=np.float64), np.array(true)


def _agreement(x_S: Floats, y_S: Floats) -> Floats:
    """Returns ``1 - (difference of the standard scores)^2 / 2``; its mean is the correlation coefficient."""
    if not (np.ptp(x_S) and np.ptp(y_S)):
        return np.zeros(len(x_S))
    x_S, y_S = ((values - values.mean()) / values.std() for values in (x_S, y_S))
    return 1.0 - (x_S - y_S) ** 2 / 2.0


def _is_mixed(true_SC: Flags) -> Flags:
    return np.asarray(true_SC.any(0) & ~true_SC.all(0))


def _in_blocks(times_RS: Floats, score: Callable[[Floats], Floats]) -> Floats:
    size = max(1, _BLOCK // times_RS.shape[1])
    return np.concatenate([score(times_RS[start : start + size]) for start in range(0, len(times_RS), size)])


def _order(values_S: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the samples in ascending order, and where in it each of the G values begins."""
    order = np.argsort(values_S, kind="stable")
    ordered = values_S[order]
    return order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _auc(scores_S: Floats, is_true_S: Flags, times_RS: Floats) -> Floats:
    order, begins = _order(scores_S)
    times_RS, is_true_S = times_RS[:, order], is_true_S[order]
    positive_RG = np.add.reduceat(times_RS * is_true_S, begins, axis=1)
    negative_RG = np.add.reduceat(times_RS * ~is_true_S, begins, axis=1)
    below_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2.0
    return ratio((positive_RG * below_RG).sum(1), positive_RG.sum(1) * negative_RG.sum(1), empty=0.5)


def _placements(scores_S: Floats, is_true_S: Flags) -> Floats:
    """Returns the share of the samples of the other side that are on the right side of each; ties count half."""
    positive, negative = np.sort(scores_S[is_true_S]), np.sort(scores_S[~is_true_S])

    def share_below(others: Floats) -> Floats:
        sides = (np.searchsorted(others, scores_S, side) for side in ("left", "right"))
        return np.asarray(sum(sides) / (2.0 * len(others)))

    return np.where(is_true_S, share_below(negative), 1.0 - share_below(positive))


def _midranks(values_S: Floats, times_RS: Floats) -> Floats:
    """Returns the rank of each sample in each resample, [R, S]."""
    order, begins = _order(values_S)
    count_RG = np.add.reduceat(times_RS[:, order], begins, axis=1)
    rank_RG = np.cumsum(count_RG, axis=1) - (count_RG - 1.0) / 2.0
    group_S = np.empty(len(values_S), dtype=np.int64)
    group_S[order] = np.repeat(np.arange(len(begins)), np.diff(np.r_[begins, len(values_S)]))
    return rank_RG[:, group_S]


def _spearman(x_S: Floats, y_S: Floats, times_RS: Floats) -> Floats:
    # Without centering, sums of squares of ranks would cancel; their mean is known.
    middle_R = (times_RS.sum(1, keepdims=True) + 1.0) / 2.0
    x_RS, y_RS = _midranks(x_S, times_RS) - middle_R, _midranks(y_S, times_RS) - middle_R
    weighted_RS = times_RS * x_RS
    spread = (weighted_RS * x_RS).sum(1) * (times_RS * y_RS * y_RS).sum(1)
    return ratio((weighted_RS * y_RS).sum(1), np.sqrt(spread))
