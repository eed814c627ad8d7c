"""The learning rate at its corners."""

from __future__ import annotations

import math

import pytest

from ingle.config import OptimConfig
from ingle.training.schedule import learning_rate, warmup_steps


def test_warmup_rises_to_the_peak_at_its_last_step() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_the_floor(schedule: str) -> None:
    config = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)
    halfway = learning_rate(config, 60, 110)
    assert halfway == pytest.approx(2.0 * 0.55)


def test_cosine_follows_sgdr() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=0)
    assert learning_rate(config, 25, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_stays() -> None:
    config = OptimConfig(lr=3.0, schedule="constant", warmup_steps=2)
    assert {learning_rate(config, step, 50) for step in range(2, 51)} == {3.0}


def test_warmup_ratio_counts_steps_up() -> None:
    assert warmup_steps(OptimConfig(warmup_ratio=0.03), 50) == 2
    assert warmup_steps(OptimConfig(warmup_ratio=0.0), 50) == 0


def test_one_step_run_trains_at_the_peak() -> None:
    assert learning_rate(OptimConfig(lr=1.0), 1, 1) == 1.0
