"""Chooses test and interval of a metric by its kind.

* rate: ``p`` and ``p_exact`` by McNemar's exact test; Newcombe's paired score interval of the difference.
* ratio: ``p`` and ``p_exact`` by the exact sign-flip test of the per-sample numerators, if the denominators are equal;
  else as for a corpus score. Paired BCa bootstrap of the difference.
* corpus: ``p`` by approximate randomization of the score in 10,000 trials, ``p_exact`` by the exact sign-flip test of
  the per-sample scores. Paired BCa bootstrap of the difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ingle.evaluation.scorers import Scorer, Scores
from ingle.evaluation.statistics import intervals, significance
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


def paired_test(scorer: Scorer, base: Scores, tuned: Scores, seed: int) -> Significance:
    """Tests the difference of two scores on the same samples."""
    kind = scorer.metric.kind
    if kind == "rate":
        num_base_only = int(np.sum(base.per_sample > tuned.per_sample))
        num_tuned_only = int(np.sum(base.per_sample < tuned.per_sample))
        p = significance.mcnemar_exact(num_base_only, num_tuned_only)
        return Significance("exact McNemar", p, "exact McNemar", p)
    # With equal denominators, the difference of the scores depends on the numerators alone.
    if kind == "ratio" and np.array_equal(base.statistics[:, 1], tuned.statistics[:, 1]):
        p = significance.sign_flip_exact(tuned.statistics[:, 0] - base.statistics[:, 0])
        return Significance(_SIGN_FLIP, p, _SIGN_FLIP, p)
    return Significance(
        f"approximate randomization, {NUM_TRIALS:,} trials",
        significance.randomization(
            base.statistics, tuned.statistics, scorer.aggregate, num_trials=NUM_TRIALS, seed=seed
        ),
        f"{_SIGN_FLIP} of per-sample scores",
        significance.sign_flip_exact(tuned.per_sample - base.per_sample),
        1 / (NUM_TRIALS + 1),
    )


def paired_interval(scorer: Scorer, base: Scores, tuned: Scores, seed: int) -> tuple[Interval, str]:
    """Returns the interval of a difference, and the name of the method."""
    if scorer.metric.kind == "rate":
        was, now = base.per_sample > 0.5, tuned.per_sample > 0.5
        counts = (int(np.sum(cell)) for cell in (was & now, ~was & now, was & ~now, ~was & ~now))
        return intervals.newcombe_paired(*counts), "Newcombe paired score"
    bounds = intervals.paired_bootstrap(
        base.statistics, tuned.statistics, scorer.aggregate, num_resamples=NUM_RESAMPLES, seed=seed
    )
    return bounds, f"paired BCa bootstrap, {NUM_RESAMPLES:,} resamples"


def single_interval(scorer: Scorer, scores: Scores, seed: int) -> tuple[Interval, str]:
    """Returns the interval of one model's score, and the name of the method."""
    if scorer.metric.kind == "rate":
        return intervals.wilson(int(scores.per_sample.sum()), len(scores.per_sample)), "Wilson score"
    bounds = intervals.bootstrap(scores.statistics, scorer.aggregate, num_resamples=NUM_RESAMPLES, seed=seed)
    return bounds, f"BCa bootstrap, {NUM_RESAMPLES:,} resamples"
