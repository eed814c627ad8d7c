"""Chooses test and interval of a metric by its kind.

* rate: ``p`` and ``p_exact`` by McNemar's exact test; Newcombe's paired score interval of the difference.
* ratio: ``p`` and ``p_exact`` by the exact sign-flip test of the per-sample numerators, if the denominators are equal;
  else as for a corpus score. Paired BCa bootstrap of the difference.
* corpus: ``p`` by approximate randomization of the score in 10,000 trials, ``p_exact`` by the exact sign-flip test of
  the per-sample scores. Paired BCa bootstrap of the difference.

If samples belong together in groups, groups are flipped, swapped and drawn, and a rate gets the sign-flip test of the
sums over groups and the bootstrap: McNemar's test and score intervals need independent samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ingle.evaluation.scorers import Scorer, Scores
from ingle.evaluation.statistics import Floats, Groups, Replicate, intervals, significance
from ingle.evaluation.statistics.intervals import Interval

NUM_TRIALS = 10_000
NUM_RESAMPLES = 10_000

_SIGN_FLIP = "exact sign-flip permutation"


@dataclass(frozen=True, slots=True)
class Significance:
    """p-values of a difference.

    Attributes:
        test: Name of the test.
        p: Its p-value.
        test_exact: Name of the exact test per sample.
        p_exact: Its p-value.
        floor: Smallest value that ``p`` can take, above 0 for a simulation.
    """

    test: str
    p: float
    test_exact: str
    p_exact: float
    floor: float = 0.0


def paired_test(scorer: Scorer, base: Scores, tuned: Scores, seed: int, groups: Groups | None = None) -> Significance:
    """Tests the difference of two scores on the same samples.

    Args:
        scorer: The scorer of both.
        base: Scores of the base.
        tuned: Scores of the tuned model.
        seed: Seed of the simulation.
        groups: Group of each sample; None if all samples are independent.
    """
    kind, of_groups = scorer.metric.kind, _of_groups(groups)
    if kind == "rate" and groups is None:
        num_base_only = int(np.sum(base.per_sample > tuned.per_sample))
        num_tuned_only = int(np.sum(base.per_sample < tuned.per_sample))
        p = significance.mcnemar_exact(num_base_only, num_tuned_only)
        return Significance("exact McNemar", p, "exact McNemar", p)
    # With equal denominators, the difference of the scores depends on the numerators alone.
    if kind == "rate" or (kind == "ratio" and np.array_equal(base.statistics[:, 1], tuned.statistics[:, 1])):
        p = significance.sign_flip_exact(_summed(tuned.statistics[:, 0] - base.statistics[:, 0], groups))
        return Significance(_SIGN_FLIP + of_groups, p, _SIGN_FLIP + of_groups, p)
    num_units = _num_units(base, groups)
    pooled = np.concatenate((base.statistics, tuned.statistics))
    pooled_groups = None if groups is None else np.concatenate((groups, groups + num_units))
    return Significance(
        f"approximate randomization, {NUM_TRIALS:,} trials{of_groups}",
        significance.randomization(
            _replicate(scorer, pooled, pooled_groups), num_units, num_trials=NUM_TRIALS, seed=seed
        ),
        f"{_SIGN_FLIP} of per-sample scores{of_groups}",
        significance.sign_flip_exact(_summed(tuned.per_sample - base.per_sample, groups)),
        1 / (NUM_TRIALS + 1),
    )


def paired_interval(
    scorer: Scorer, base: Scores, tuned: Scores, seed: int, groups: Groups | None = None
) -> tuple[Interval, str]:
    """Returns the interval of a difference, and the name of the method; arguments as for :func:`paired_test`."""
    if scorer.metric.kind == "rate" and groups is None:
        was, now = base.per_sample > 0.5, tuned.per_sample > 0.5
        counts = (int(np.sum(cell)) for cell in (was & now, ~was & now, was & ~now, ~was & ~now))
        return intervals.newcombe_paired(*counts), "Newcombe paired score"
    bounds = intervals.paired_bootstrap(
        _replicate(scorer, base.statistics, groups),
        _replicate(scorer, tuned.statistics, groups),
        _num_units(base, groups),
        num_resamples=NUM_RESAMPLES,
        seed=seed,
    )
    return bounds, f"paired BCa bootstrap, {NUM_RESAMPLES:,} resamples{_of_groups(groups)}"


def single_interval(scorer: Scorer, scores: Scores, seed: int, groups: Groups | None = None) -> tuple[Interval, str]:
    """Returns the interval of one model's score, and the name of the method."""
    if scorer.metric.kind == "rate" and groups is None:
        return intervals.wilson(int(scores.per_sample.sum()), len(scores.per_sample)), "Wilson score"
    bounds = intervals.bootstrap(
        _replicate(scorer, scores.statistics, groups),
        _num_units(scores, groups),
        num_resamples=NUM_RESAMPLES,
        seed=seed,
    )
    return bounds, f"BCa bootstrap, {NUM_RESAMPLES:,} resamples{_of_groups(groups)}"


def _replicate(scorer: Scorer, statistics_SK: Floats, groups: Groups | None) -> Replicate:
    """Returns the function that scores multiplicities of samples, or of groups."""
    if groups is None:
        return lambda times_RS: scorer.replicate(statistics_SK, times_RS)
    return lambda times_RU: scorer.replicate(statistics_SK, times_RU[:, groups])


def _summed(values_S: Floats, groups: Groups | None) -> Floats:
    return values_S if groups is None else np.bincount(groups, weights=values_S).astype(np.float64)


def _num_units(scores: Scores, groups: Groups | None) -> int:
    return len(scores.per_sample) if groups is None else int(groups.max()) + 1


def _of_groups(groups: Groups | None) -> str:
    return "" if groups is None else f" of {int(groups.max()) + 1:,} groups"
