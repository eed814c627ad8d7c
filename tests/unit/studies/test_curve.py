"""Curves of losses, where they reach a target, and how certain that is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from ingle.studies.curve import compare, crossing, falling, find_dimension, half_of, mean_losses, resample

DIMS = (16, 64, 256, 1024, 4096)
#: Where the curve below has 90 % of the gain.
TRUE = 2 ** (10 + 2 * (0.13 - 0.1) / (0.13 - 0.02))


def _tables(loss: float, generator: np.random.Generator, *, num_seeds: int = 3, noise: float = 0.1) -> list[np.ndarray]:
    """Tables of one configuration: each group has a difficulty of its own, which all configurations share."""
    difficulty = np.random.default_rng(0).normal(1.0, 0.3, 80)
    counts = np.random.default_rng(1).integers(5, 40, 80).astype(float)
    return [
        np.stack([counts * (difficulty + loss + generator.normal(0, noise, 80)), counts], 1) for _ in range(num_seeds)
    ]


def test_falling_is_the_closest_falling_sequence() -> None:
    losses = np.random.default_rng(0).normal(size=30) - np.arange(30) / 10
    np.testing.assert_allclose(falling(losses), isotonic_regression(losses, increasing=False).x, rtol=1e-12)


def test_crossing_is_between_dimensions_by_their_logarithms() -> None:
    losses = np.array([4.0, 3.0, 2.0, 1.0, 1.0])
    assert crossing(DIMS, losses, 1.5) == pytest.approx(512.0)
    assert crossing(DIMS, losses, 5.0) == 16
    assert crossing(DIMS, losses, 0.5) == math.inf


def test_resampled_losses_are_paired() -> None:
    generator = np.random.default_rng(2)
    first = _tables(1.0, generator)
    shifted = [np.stack([table[:, 0] + 0.25 * table[:, 1], table[:, 1]], 1) for table in first]
    losses = resample([first, shifted])
    np.testing.assert_allclose(losses[:, 1] - losses[:, 0], 0.25, rtol=1e-9)
    assert losses[:, 0].std() > 0.01
    found = compare(shifted, first)
    assert found.value == pytest.approx(0.25)
    assert found.p < 1e-6


def test_the_standard_error_of_a_difference_is_that_of_a_paired_ratio() -> None:
    generator = np.random.default_rng(3)
    one, other = (_tables(loss, generator, num_seeds=1, noise=0.5) for loss in (1.0, 1.1))
    saved, counts = one[0][:, 0] - other[0][:, 0], one[0][:, 1]
    ratio = saved.sum() / counts.sum()
    expected = math.sqrt(80 / 79 * ((saved - ratio * counts) ** 2).sum()) / counts.sum()
    assert compare(one, other).stderr == pytest.approx(expected, rel=0.1)


def test_halves_are_apart_and_complete() -> None:
    table = np.arange(14.0).reshape(7, 2)
    rows = np.concatenate([half_of(table, 0), half_of(table, 1)])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, table))


def _curve(generator: np.random.Generator, noise: float) -> tuple[float | None, float, float]:
    losses = (1.0, 0.8, 0.7, 0.4, 0.13, 0.02)  # of the floor, then of each dimension
    floor, *points = (_tables(loss, generator, noise=noise) for loss in losses)
    ceiling = _tables(0.0, generator, noise=noise)
    found = find_dimension(DIMS, points, floor, ceiling, 0.9)
    return found.value, found.low or 0.0, found.high or math.inf


def test_the_interval_contains_the_dimension() -> None:
    value, low, high = _curve(np.random.default_rng(0), 0.1)
    assert value == pytest.approx(TRUE, rel=0.15)
    assert low < TRUE < high


@pytest.mark.sweep
def test_the_interval_covers_as_often_as_it_says() -> None:
    found = [_curve(np.random.default_rng(seed), 0.2) for seed in range(100)]
    assert sum(low <= TRUE <= high for _, low, high in found) >= 85


def test_a_target_that_is_not_reached_is_said() -> None:
    generator = np.random.default_rng(0)
    floor, ceiling = _tables(1.0, generator), _tables(0.0, generator)
    points = [_tables(loss, generator) for loss in (0.9, 0.8, 0.7, 0.6, 0.5)]
    found = find_dimension(DIMS, points, floor, ceiling, 0.9)
    assert (found.value, found.high, found.reached, found.largest) == (None, None, False, 4096)
    assert mean_losses(points[0]).shape == (3,)


def test_without_a_gain_there_is_no_dimension() -> None:
    generator = np.random.default_rng(0)
    same = [_tables(0.5, generator, noise=0.5) for _ in range(4)]
    found = find_dimension(DIMS[:2], same[:2], same[2], same[3], 0.9)
    assert (found.value, found.reached, found.has_gain) == (None, False, False)
