"""The learning rate of a method is searched where it is, and the edge of a grid is said."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ingle.studies.rates import best_rate
from ingle.studies.trials import Score, Trial


class _Trials:
    """Trials whose loss has one best learning rate, and that fail above another one."""

    def __init__(self, best: float, fails_above: float = math.inf) -> None:
        self.best, self.fails_above = best, fails_above
        self.asked: list[tuple[float, int]] = []

    def run(self, trial: Trial) -> Score:
        self.asked.append((trial.lr, trial.seed))
        loss = 1 + math.log(trial.lr / self.best) ** 2
        failure = "The loss became nan" if trial.lr > self.fails_above else None
        table = [[loss * 10, 10.0]] * 6
        return Score(trial.label, trial.label, trial.lr, trial.seed, loss=loss, groups=table, failure=failure)


def _search(trials: Any, num_rates: int = 3) -> Any:
    return best_rate(trials, lambda lr, seed: Trial("x", {}, lr, seed), 1e-3, num_rates, [0, 1, 2])


@pytest.mark.parametrize(("best", "found"), [(1e-3, 1e-3), (3e-3, 3e-3), (1e-2, 9e-3), (2e-4, 3.333e-4)])
def test_the_best_rate_is_found_and_run_with_all_seeds(best: float, found: float) -> None:
    trials = _Trials(best)
    choice = _search(trials)
    assert choice.lr == pytest.approx(found)
    assert [score.seed for score in choice.scores] == [0, 1, 2]
    assert {score.lr for score in choice.scores} == {choice.lr}
    assert not choice.at_edge
    assert len(set(trials.asked)) == len(trials.asked)


def test_a_rate_beyond_the_grid_is_said() -> None:
    choice = _search(_Trials(10.0))
    assert choice.at_edge
    assert choice.lr == pytest.approx(27e-3)  # three rates and two extensions


def test_rates_that_fail_are_not_chosen() -> None:
    choice = _search(_Trials(1.0, fails_above=1.5e-3))
    assert choice.lr == pytest.approx(1e-3)
    assert not choice.failed
    assert _search(_Trials(1.0, fails_above=0)).failed


def test_one_rate_is_taken_as_it_is() -> None:
    choice = _search(_Trials(1.0), num_rates=1)
    assert (choice.lr, choice.at_edge) == (1e-3, False)
