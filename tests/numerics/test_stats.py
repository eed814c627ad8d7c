"""Tests and intervals against scipy, closed forms and published examples."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from scipy.stats import binomtest, norm, permutation_test, wilcoxon
from scipy.stats import bootstrap as scipy_bootstrap

from ingle.evaluation.statistics.intervals import bootstrap, newcombe_paired, paired_bootstrap, wilson
from ingle.evaluation.statistics.significance import holm, mcnemar_exact, randomization, sign_flip_exact


def mean(totals):
    return totals[..., 0] / totals[..., 1]


def replicated(*statistics):
    """Scores multiplicities of the samples, or of the samples of two models."""
    pooled = np.concatenate(statistics)
    return lambda times: mean(times @ pooled)


def with_ones(values):
    values = np.asarray(values, dtype=np.float64)
    return np.stack((values, np.ones_like(values)), axis=1)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (21, 39), (39, 21), (7, 7), (1, 30), (200, 260)])
def test_mcnemar_equals_the_binomial_test(b, c):
    expected = binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_the_reference_example():
    # n = 300, 51.7 % against 57.7 %: an unpaired test (p = .14) would miss it.
    assert mcnemar_exact(21, 39) == pytest.approx(0.0273401, abs=1e-7)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 14])
def test_sign_flip_by_enumeration_equals_scipy(num_samples):
    differences = np.random.default_rng(num_samples).normal(0.3, 1.0, num_samples)
    expected = (
        permutation_test(
            (differences, np.zeros(num_samples)),
            lambda x, y, axis: (x - y).mean(axis=axis),
            permutation_type="samples",
            n_resamples=np.inf,
            vectorized=True,
        ).pvalue
        if num_samples > 1
        else 1.0
    )
    assert sign_flip_exact(differences) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_samples", [21, 40, 300])
def test_sign_flip_on_the_grid_equals_the_exact_wilcoxon_distribution_on_ranks(num_samples):
    # Signed ranks are integers, so the grid holds them exactly; scipy counts the same distribution otherwise.
    values = np.random.default_rng(num_samples).normal(0.15, 1.0, num_samples)
    signed_ranks = np.sign(values) * (np.argsort(np.argsort(np.abs(values))) + 1)
    assert sign_flip_exact(signed_ranks) == pytest.approx(wilcoxon(values, method="exact").pvalue, rel=1e-9)


def test_sign_flip_of_right_and_wrong_is_mcnemar():
    differences = np.r_[-np.ones(21), np.ones(39), np.zeros(240)]
    assert sign_flip_exact(differences) == pytest.approx(mcnemar_exact(21, 39), rel=1e-12)
    assert sign_flip_exact(differences / 3) == pytest.approx(mcnemar_exact(21, 39), rel=1e-12)


def test_the_grid_agrees_with_enumeration_on_values_that_are_not_integers():
    # Zeros and ties drop out, so 21 samples force the grid and brute force still lists every pattern of 15.
    values = np.random.default_rng(3).normal(0.4, 1.0, 22)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=11)))
    halves = signs @ np.abs(values[:11]), signs @ np.abs(values[11:])
    sums = np.abs(halves[0][:, None] + halves[1][None, :])
    expected = np.mean(sums >= abs(values.sum()) - 1e-12)
    assert sign_flip_exact(values) == pytest.approx(expected, rel=2e-4)


def test_sign_flip_reaches_probabilities_no_simulation_can():
    assert sign_flip_exact(np.full(60, 0.25)) == pytest.approx(2.0**-59, rel=1e-12)
    graded = np.random.default_rng(0).uniform(0.1, 1.0, 60)  # all positive: only the one pattern and its mirror
    assert sign_flip_exact(graded) == pytest.approx(2.0**-59, rel=1e-9)
    assert sign_flip_exact(np.full(3000, 1.0)) == sys.float_info.min


def test_no_difference_is_p_one():
    assert sign_flip_exact(np.zeros(30)) == 1.0
    assert sign_flip_exact([0.1, -0.1]) == 1.0
    assert sign_flip_exact([0.1 + 0.2 - 0.3, 0.0]) == 1.0 or sign_flip_exact([0.1 + 0.2 - 0.3, 1.0]) == 1.0


def test_rounding_noise_is_a_tie():
    # 0.1 + 0.2 != 0.3 in floats; as a "difference" among real ones it must not add a sign pattern.
    noise = 0.1 + 0.2 - 0.3
    assert noise != 0
    assert sign_flip_exact([1.0, 1.0, 1.0, noise]) == sign_flip_exact([1.0, 1.0, 1.0])


@pytest.mark.parametrize("num_samples", [12, 60])
def test_sign_flip_keeps_its_level_under_the_null(num_samples):
    rng = np.random.default_rng(7)
    num_trials = 400 if num_samples < 21 else 120
    # skewed magnitudes, random signs: exchangeable and far from normal
    p_values = [
        sign_flip_exact(np.round(rng.exponential(1.0, num_samples), 2) * rng.choice([-1, 1], num_samples))
        for _ in range(num_trials)
    ]
    false_alarms = sum(p <= 0.05 for p in p_values)
    assert binomtest(false_alarms, num_trials, 0.05, alternative="greater").pvalue > 1e-3
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.08)


def test_randomization_of_a_mean_approaches_the_exact_distribution():
    differences = np.random.default_rng(5).normal(0.35, 1.0, 25)
    p = randomization(replicated(with_ones(np.zeros(25)), with_ones(differences)), 25, num_trials=40_000, seed=1)
    exact = sign_flip_exact(differences)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000))


def test_randomization_counts_ties_and_is_never_zero():
    same = with_ones(np.random.default_rng(0).uniform(size=30))
    assert randomization(replicated(same, same), 30, num_trials=200) == 1.0
    far = with_ones(np.zeros(60)), with_ones(np.ones(60))
    assert randomization(replicated(*far), 60, num_trials=200) == 1 / 201


def test_randomization_is_the_same_for_the_same_seed():
    rng = np.random.default_rng(0)
    pair = with_ones(rng.normal(size=50)), with_ones(rng.normal(size=50))
    pooled = replicated(*pair)
    assert randomization(pooled, 50, num_trials=500, seed=3) == randomization(pooled, 50, num_trials=500, seed=3)


def test_randomization_keeps_its_level_under_the_null():
    rng = np.random.default_rng(11)
    num_trials = 300
    p_values = []
    for trial in range(num_trials):
        base = rng.gamma(0.5, size=(30, 2)) + 0.1
        tuned = rng.gamma(0.5, size=(30, 2)) + 0.1
        p_values.append(randomization(replicated(base, tuned), 30, num_trials=300, seed=trial))
    assert binomtest(sum(p <= 0.05 for p in p_values), num_trials, 0.05, alternative="greater").pvalue > 1e-3
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.07)


def test_holm_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("right", "n"), [(9, 10), (0, 30), (30, 30), (1, 3), (517, 1319)])
def test_wilson_equals_scipy(right, n):
    expected = binomtest(right, n).proportion_ci(method="wilson")
    found = wilson(right, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_newcombe_paired_equals_published_examples():
    # Fagerland, Lydersen and Laake 2014, Stat. Med. 33:2850: airway hyper-responsiveness, (1, 1, 7, 12).
    found = newcombe_paired(1, 1, 7, 12)
    assert (found.low, found.high) == pytest.approx((-0.507, -0.026), abs=5e-4)
    # Newcombe 1998, table II: (36, 12, 2, 0).
    found = newcombe_paired(36, 12, 2, 0)
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_newcombe_paired_is_antisymmetric_and_never_a_point():
    one, other = newcombe_paired(30, 12, 5, 53), newcombe_paired(30, 5, 12, 53)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    all_won = newcombe_paired(0, 40, 0, 0)
    assert all_won.low < 0.95 and all_won.high == 1.0
    no_discordance = newcombe_paired(20, 0, 0, 20)
    assert no_discordance.low < 0 < no_discordance.high


def test_newcombe_paired_covers():
    rng = np.random.default_rng(2)
    cells = np.array([0.3, 0.25, 0.1, 0.35])
    inside = 0
    for counts in rng.multinomial(60, cells, size=1000):
        found = newcombe_paired(*(int(count) for count in counts))
        inside += found.low <= cells[1] - cells[2] <= found.high
    assert 0.93 <= inside / 1000 <= 0.985


def test_bootstrap_equals_scipys_bca():
    values = np.random.default_rng(4).lognormal(0, 1, 80)
    found = bootstrap(replicated(with_ones(values)), 80, num_resamples=40_000, seed=1)
    expected = scipy_bootstrap((values,), np.mean, method="BCa", n_resamples=40_000, rng=np.random.default_rng(1))
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.05 * width)
    assert found.stderr == pytest.approx(values.std(ddof=0) / math.sqrt(80), rel=0.02)


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(6)
    difficulty = rng.normal(size=100)
    base, tuned = difficulty + rng.normal(0, 0.1, 100), difficulty + 0.2 + rng.normal(0, 0.1, 100)
    found = paired_bootstrap(replicated(with_ones(base)), replicated(with_ones(tuned)), 100)
    assert found.low <= (tuned - base).mean() <= found.high
    assert found.stderr == pytest.approx((tuned - base).std(ddof=0) / 10, rel=0.05)
    assert found.low > 0.1  # unpaired, the interval would be +- 0.28


def test_paired_bootstrap_covers_a_ratio():
    rng = np.random.default_rng(8)
    inside = 0
    for trial in range(300):
        weights = rng.gamma(2.0, 1.0, 60) + 0.2
        noise = rng.normal(0, 0.5, 60) * weights
        base = np.stack((weights * 2.0 + noise, weights), axis=1)
        tuned = np.stack((weights * 1.7 + noise + rng.normal(0, 0.3, 60) * weights, weights), axis=1)
        found = paired_bootstrap(replicated(base), replicated(tuned), 60, num_resamples=1000, seed=trial)
        inside += found.low <= -0.3 <= found.high
    assert 0.90 <= inside / 300 <= 0.985


def test_intervals_of_degenerate_samples():
    constant = bootstrap(replicated(with_ones(np.full(9, 0.4))), 9)
    assert (constant.low, constant.high) == pytest.approx((0.4, 0.4))
    single = bootstrap(replicated(with_ones([0.4])), 1)
    assert math.isnan(single.low) and math.isnan(single.high)


def test_normal_limit():
    differences = np.random.default_rng(1).normal(0.1, 1.0, 1500)
    z = differences.sum() / math.sqrt((differences**2).sum())
    assert sign_flip_exact(differences) == pytest.approx(2 * norm.sf(abs(z)), rel=0.05)
