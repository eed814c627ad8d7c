"""95 % confidence intervals of scores and of paired differences.

Rates get a score interval (Wilson; Newcombe for a paired difference), which is valid even at 0 of n and n of n. All
other scores get the bias-corrected and accelerated (BCa) bootstrap over samples; for a difference, a sample is drawn
for base and tuned together, so that its difficulty cancels.

Legend: S samples, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from ingle.evaluation.statistics import Floats, Replicate
from ingle.evaluation.statistics.significance import row_chunks

#: More samples are left out in this many blocks for the acceleration of BCa, which the block size hardly changes.
MAX_LEFT_OUT = 2_000

#: The 97.5 % quantile of the normal distribution.
Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval and its standard error; NaN for a single sample."""

    low: float
    high: float
    stderr: float


def wilson(num_right: int, num_samples: int) -> Interval:
    """Returns the interval of a rate.

    Source: Wilson 1927, JASA 22:209, equation 4.
    """
    if num_samples == 0:
        return Interval(0.0, 1.0, math.nan)
    rate, z2 = num_right / num_samples, Z95 * Z95
    center = (rate + z2 / (2 * num_samples)) / (1 + z2 / num_samples)
    half = Z95 * math.sqrt(rate * (1 - rate) / num_samples + z2 / (4 * num_samples**2)) / (1 + z2 / num_samples)
    low = 0.0 if num_right == 0 else center - half
    high = 1.0 if num_right == num_samples else center + half
    return Interval(low, high, math.sqrt(rate * (1 - rate) / num_samples))


def newcombe_paired(num_both: int, num_tuned_only: int, num_base_only: int, num_neither: int) -> Interval:
    """Returns the interval of (tuned rate - base rate) over the same samples.

    Source: Newcombe 1998, Stat. Med. 17:2635, method 10 (Wilson intervals of both rates, combined by their correlation
    with continuity correction).

    Args:
        num_both: Samples that both models got right.
        num_tuned_only: Samples that only the tuned model got right.
        num_base_only: Samples that only the base got right.
        num_neither: Samples that neither got right.
    """
    n = num_both + num_tuned_only + num_base_only + num_neither
    tuned_right, base_right = num_both + num_tuned_only, num_both + num_base_only
    tuned, base = wilson(tuned_right, n), wilson(base_right, n)
    tuned_rate, base_rate = tuned_right / n, base_right / n
    delta = tuned_rate - base_rate
    phi = _newcombe_phi(num_both, num_tuned_only, num_base_only, num_neither)
    below, base_above = tuned_rate - tuned.low, base.high - base_rate
    above, base_below = tuned.high - tuned_rate, base_rate - base.low
    low = delta - math.sqrt(max(0.0, below**2 - 2 * phi * below * base_above + base_above**2))
    high = delta + math.sqrt(max(0.0, above**2 - 2 * phi * above * base_below + base_below**2))
    stderr = math.sqrt(max(0.0, (num_tuned_only + num_base_only) / n - delta**2) / n)
    return Interval(max(-1.0, low), min(1.0, high), stderr)


def _newcombe_phi(both: int, tuned_only: int, base_only: int, neither: int) -> float:
    margins = (both + tuned_only) * (base_only + neither) * (both + base_only) * (tuned_only + neither)
    if margins == 0:
        return 0.0
    determinant = float(both * neither - tuned_only * base_only)
    if determinant > 0:  # corrected towards no correlation, which widens the interval
        determinant = max(determinant - (both + tuned_only + base_only + neither) / 2, 0.0)
    return determinant / math.sqrt(margins)


def bootstrap(replicate: Replicate, num_samples: int, *, num_resamples: int = 10_000, seed: int = 0) -> Interval:
    """Returns the interval of a score by the BCa bootstrap.

    Source: Efron 1987, JASA 82:171.

    Args:
        replicate: Returns the score, or the difference of two scores, of resamples.
        num_samples: Number of samples, or of groups.
        num_resamples: Number of draws of S samples with replacement.
        seed: Seed of the draws.
    """
    if num_samples < 2:
        return Interval(math.nan, math.nan, math.nan)
    estimate = float(replicate(np.ones((1, num_samples)))[0])
    replicates_R = _replicates(replicate, num_samples, num_resamples, seed)
    stderr = float(replicates_R.std(ddof=1))
    slack = 1e-12 * max(1.0, abs(estimate))
    below = np.mean((replicates_R < estimate - slack) + 0.5 * (np.abs(replicates_R - estimate) <= slack))
    if not 0.0 < below < 1.0 or stderr <= slack:
        low, high = np.quantile(replicates_R, (0.025, 0.975))
        return Interval(float(low), float(high), stderr)
    acceleration = _acceleration(_left_out(replicate, num_samples))
    low, high = np.quantile(replicates_R, _bca_levels(float(norm.ppf(below)), acceleration))
    return Interval(float(low), float(high), stderr)


def paired_bootstrap(
    base: Replicate, tuned: Replicate, num_samples: int, *, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Returns the interval of the difference (tuned - base); each sample is drawn for both or for neither."""

    def difference(times_RS: Floats) -> Floats:
        return tuned(times_RS) - base(times_RS)

    return bootstrap(difference, num_samples, num_resamples=num_resamples, seed=seed)


def _replicates(replicate: Replicate, num_samples: int, num_resamples: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    scores = []
    for size in row_chunks(num_resamples, num_samples):
        rows = np.arange(size)[:, None] * num_samples
        drawn = rows + rng.integers(num_samples, size=(size, num_samples), dtype=np.int32)
        times_RS = np.bincount(drawn.ravel(), minlength=size * num_samples).reshape(size, num_samples)
        scores.append(replicate(times_RS.astype(np.float64)))
    return np.concatenate(scores)


def _left_out(replicate: Replicate, num_samples: int) -> Floats:
    """Returns the scores without each sample; of many samples, without each of :data:`MAX_LEFT_OUT` blocks."""
    num_blocks = min(num_samples, MAX_LEFT_OUT)
    block_S = np.arange(num_samples) * num_blocks // num_samples
    scores, start = [], 0
    for size in row_chunks(num_blocks, num_samples):
        scores.append(replicate((block_S[None] != np.arange(start, start + size)[:, None]).astype(np.float64)))
        start += size
    return np.concatenate(scores)


def _acceleration(left_out_S: Floats) -> float:
    centered = left_out_S.mean() - left_out_S
    spread = float((centered**2).sum())
    return 0.0 if spread == 0.0 else float((centered**3).sum()) / (6.0 * spread**1.5)


def _bca_levels(bias: float, acceleration: float) -> tuple[float, float]:
    def level(z: float) -> float:
        return float(norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))

    return level(-Z95), level(Z95)
