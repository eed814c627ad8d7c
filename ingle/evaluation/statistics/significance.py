"""Tests whether a paired difference between the scores of tuned model and base could be due to chance.

Both models answer the same samples, so the difficulty of the samples cancels. The null hypothesis of every test is that
the two answers to a sample can be exchanged; nothing else is assumed (no normal distribution, no large sample):

* right-or-wrong scores: exact McNemar test, a binomial test over the discordant pairs;
* other means of per-sample scores: exact sign-flip (Fisher-Pitman) test of the difference that is shown, by enumeration
  for few samples and by dynamic programming on an integer grid for more;
* scores that are not means (BLEU, chrF, F1, correlations): approximate randomization.

Legend: S samples, R resamples or trials.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from ingle.evaluation.statistics import Floats, Replicate

#: Up to this number of samples, all 2^S sign patterns are enumerated.
ENUMERATED_SAMPLES = 20

#: Differences below this share of the sum of all are treated as ties: they are rounding errors.
TIE_TOLERANCE = 1e-12

#: Additions that one exact distribution may cost: a few hundredths of a second on one core.
GRID_COST = 40_000_000


def mcnemar_exact(num_base_only: int, num_tuned_only: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, by which discordant pairs split like coin tosses.

    Source: McNemar 1947, Psychometrika 12:153; exact form in Fagerland et al. 2013, BMC Med. Res. Methodol. 13:91.

    Args:
        num_base_only: Samples that only the base got right.
        num_tuned_only: Samples that only the tuned model got right.
    """
    discordant = num_base_only + num_tuned_only
    tail = float(binom.cdf(min(num_base_only, num_tuned_only), discordant, 0.5)) if discordant else 1.0
    return _clamp(2.0 * tail)


def sign_flip_exact(differences_S: npt.ArrayLike) -> float:
    """Returns the two-sided exact p-value of the mean difference under all 2^S sign flips of the differences.

    Up to 20 samples, every pattern is enumerated. For more, the differences are rounded to an integer grid with steps
    finer than a fiftieth of the width of the null distribution, and the distribution on the grid is computed exactly.
    Rounding keeps the sign symmetry of the null hypothesis, so the test is exact for any number of samples.

    Source: Pitman 1937, J. R. Stat. Soc. Suppl. 4:119; dynamic programming as in Pagano and Tritchler 1983,
    JASA 78:435.

    Args:
        differences_S: Tuned minus base, one per sample.
    """
    differences = np.asarray(differences_S, dtype=np.float64)
    magnitudes = np.abs(differences)
    total = float(magnitudes.sum())
    keep = magnitudes > total * TIE_TOLERANCE
    differences, magnitudes = differences[keep], magnitudes[keep]
    if not len(differences):
        return 1.0
    if len(differences) <= ENUMERATED_SAMPLES:
        return _sign_flip_enumerated(differences)
    ints = np.rint(magnitudes / _grid_step(magnitudes)).astype(np.int64)
    signed = np.where(differences > 0, ints, -ints)
    return _clamp(_sign_flip_on_grid(ints, int(signed.sum())))


def _sign_flip_enumerated(differences_S: Floats) -> float:
    sums = np.zeros(1)
    for magnitude in np.abs(differences_S):
        sums = np.concatenate((sums + magnitude, sums - magnitude))
    slack = TIE_TOLERANCE * float(np.abs(differences_S).sum())
    return float(np.mean(np.abs(sums) >= abs(float(differences_S.sum())) - slack))


def _grid_step(magnitudes_S: Floats) -> float:
    """Returns the unit of the grid: the smallest score if all are multiples of it, else the finest that is cheap."""
    num_samples = len(magnitudes_S)
    num_states = max(GRID_COST // num_samples, 16 * num_samples)
    total, smallest = float(magnitudes_S.sum()), float(magnitudes_S.min())
    multiples = magnitudes_S / smallest
    if total / smallest <= num_states and bool(np.all(np.abs(multiples - np.rint(multiples)) < 1e-9)):
        return smallest
    return total / num_states


def _sign_flip_on_grid(magnitudes_S: npt.NDArray[np.int64], observed: int) -> float:
    """Returns P(|sum of randomly signed integers| >= |observed|). Only positive terms are added: no cancellation."""
    total = int(magnitudes_S.sum())
    probability = np.zeros(total + 1)  # of each possible sum of the magnitudes with a positive sign
    probability[0] = 1.0
    top = 0
    for magnitude in np.sort(magnitudes_S):
        shifted = probability[: top + 1].copy()
        top += int(magnitude)
        probability[magnitude : top + 1] += shifted
        probability[: top + 1] *= 0.5
    positive = (total + abs(observed)) // 2  # the sum of the positive magnitudes at the observed difference
    return 1.0 if observed == 0 else 2.0 * float(probability[positive:].sum())


def randomization(pooled: Replicate, num_samples: int, *, num_trials: int = 10_000, seed: int = 0) -> float:
    """Returns the two-sided p-value of a difference of scores when outputs are swapped between models at random.

    It is ``(c + 1) / (trials + 1)``, where ``c`` trials differ at least as much as observed. Ties count; sacrebleu
    counts only trials that differ more, which gives p = 1e-4 for two identical systems.

    Source: Noreen 1989; Riezler and Maxwell 2005, ACL workshop on evaluation measures, section 4.

    Args:
        pooled: Scores resamples of the outputs of both models: its multiplicities are float64 [R, 2 S], those of the
            base and then those of the tuned model.
        num_samples: Number of samples, or of groups, S.
        num_trials: Number of random swaps.
        seed: Seed of the swaps.
    """
    rng = np.random.default_rng(seed)

    def distances(swapped_RS: Floats) -> Floats:
        kept_RS = 1.0 - swapped_RS
        tuned = pooled(np.concatenate((swapped_RS, kept_RS), axis=1))
        base = pooled(np.concatenate((kept_RS, swapped_RS), axis=1))
        return np.abs(tuned - base)

    observed = float(distances(np.zeros((1, num_samples)))[0])
    count = 0
    for size in row_chunks(num_trials, num_samples):
        swapped = rng.integers(2, size=(size, num_samples), dtype=np.int8).astype(np.float64)
        count += int(np.count_nonzero(distances(swapped) >= observed * (1 - 1e-9) - 1e-12))
    return (count + 1) / (num_trials + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected so that the probability of any false positive stays below the significance level.

    Source: Holm 1979, Scand. J. Stat. 6:65.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted


def row_chunks(num_rows: int, num_samples: int) -> list[int]:
    """Returns sizes of row blocks, so that rows x samples of float64 stay within 64 MiB."""
    size = max(1, min(num_rows, 8_388_608 // max(1, num_samples)))
    return [min(size, num_rows - start) for start in range(0, num_rows, size)]


def _clamp(p: float) -> float:
    """Returns a p-value above 0: a probability below the smallest float becomes that float."""
    return min(1.0, max(p, sys.float_info.min))
