"""Which step is kept and when a run stops, against brute force."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ingle.config.train import EarlyStopping
from ingle.training.selection import Selection, mean_loss, paired_difference


def _tables(num: int, groups: int = 40, seed: int = 0) -> list[Tensor]:
    """Tables of a loss that falls and rises again, with noise that all steps share and some of their own."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 20, groups)
    level, slope = rng.gamma(2, 1, groups), rng.normal(1, 0.3, groups)
    means = [level + slope * 0.01 * (step - num / 2) ** 2 + rng.normal(0, 0.1, groups) for step in range(num)]
    return [torch.from_numpy(np.stack([mean * counts, counts.astype(float)], 1)) for mean in means]


def test_the_standard_error_is_that_of_resampled_groups() -> None:
    old, new, *_ = _tables(2, groups=200)
    difference, stderr = paired_difference(old, new)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(4000):
        chosen = rng.integers(0, len(old), len(old))
        drawn.append(float((old[chosen, 0] - new[chosen, 0]).sum() / old[chosen, 1].sum()))
    assert difference == pytest.approx(mean_loss(old) - mean_loss(new))
    assert stderr == pytest.approx(np.std(drawn), rel=0.05)


def test_one_group_has_no_standard_error() -> None:
    difference, stderr = paired_difference(torch.tensor([[6.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    assert (difference, stderr) == (2.0, float("inf"))


@pytest.mark.parametrize(("patience", "min_delta"), [(1, None), (3, None), (2, 0.0), (2, 0.05), (5, 1.0)])
def test_best_step_and_end_are_those_of_brute_force(patience: int, min_delta: float | None) -> None:
    for seed in range(10):
        tables = _tables(20, seed=seed)
        losses = [mean_loss(table) for table in tables]
        selection = Selection(EarlyStopping(patience=patience, min_delta=min_delta))
        reference = 0
        for step, table in enumerate(tables):
            selection.add(10 * step, table)
            gain, stderr = paired_difference(tables[reference], table)
            if gain > (stderr if min_delta is None else min_delta):
                reference = step
            assert selection.best_step == 10 * int(np.argmin(losses[: step + 1]))
            assert selection.should_stop == (step - reference >= patience)
            assert selection.history[-1].rise == pytest.approx(losses[step] - min(losses[: step + 1]))


def test_slow_steady_progress_does_not_stop_a_run() -> None:
    """Each gain is below its standard error, but gains add up until they count."""
    rng = np.random.default_rng(0)
    level = rng.gamma(2, 1, 400)
    selection = Selection(EarlyStopping(patience=10))
    below = 0
    for step in range(60):
        loss = level - 0.0004 * step + rng.normal(0, 0.02, 400)
        point = selection.add(step, torch.from_numpy(np.stack([loss, np.ones(400)], 1)))
        below += point.gain is not None and point.gain_stderr is not None and point.gain <= point.gain_stderr
        assert not selection.should_stop
    assert below > 30


def test_without_early_stopping_a_run_never_stops() -> None:
    selection = Selection()
    for step in range(50):
        selection.add(step, torch.tensor([[1.0 + step, 1.0], [1.0, 1.0]]))
    assert selection.best_step == 0 and not selection.should_stop


def test_the_state_continues_the_selection_through_a_file() -> None:
    tables = _tables(12)
    expected = Selection(EarlyStopping(patience=3))
    for step, table in enumerate(tables):
        expected.add(step, table, {"chrf": step / 3})
    for cut in range(len(tables)):
        first, second = Selection(EarlyStopping(patience=3)), Selection(EarlyStopping(patience=3))
        for step in range(cut):
            first.add(step, tables[step], {"chrf": step / 3})
        second.load_state_dict(_through_a_file(first.state_dict()))
        for step in range(cut, len(tables)):
            second.add(step, tables[step], {"chrf": step / 3})
        assert second.history == expected.history
        assert (second.best_step, second.should_stop) == (expected.best_step, expected.should_stop)


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return {**json.loads(json.dumps(values)), **tensors}
