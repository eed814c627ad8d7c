"""The learning rate of a method: a grid around a guess, extended while the best one is at its edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ingle.studies.curve import Tables, half_of, mean_losses
from ingle.studies.trials import Score, Trial, Trials, groups

#: Factor between neighboring rates.
FACTOR = 3.0
#: How often a grid is extended.
_EXTENSIONS = 2


@dataclass(frozen=True, slots=True)
class Choice:
    """A method at its best learning rate.

    Attributes:
        lr: The chosen rate.
        scores: The trials at this rate, one per seed.
        tried: All trials of the method.
        at_edge: Whether a rate beyond the tried ones may be better.
    """

    lr: float
    scores: tuple[Score, ...]
    tried: tuple[Score, ...]
    at_edge: bool

    @property
    def failed(self) -> bool:
        """Whether a trial at the chosen rate did not end."""
        return any(score.failure is not None for score in self.scores)

    def tables(self) -> Tables:
        """Returns the tables of the groups that did not choose the rate, [G, 2] for each seed."""
        return [half_of(groups(score), 1) for score in self.scores]

    def start_tables(self) -> Tables:
        """Returns the same before the first step."""
        return [half_of(np.asarray(score.start_groups).reshape(-1, 2), 1) for score in self.scores]


def best_rate(
    trials: Trials, make: Callable[[float, int], Trial], guess: float, num_rates: int, seeds: Sequence[int]
) -> Choice:
    """Finds the learning rate of a method, and runs it with all seeds.

    The first seed chooses, on half of the held-out groups; the other half is left for the score.

    Args:
        trials: Runs the trials.
        make: Returns the trial of a rate and a seed.
        guess: The middle of the grid.
        num_rates: Rates to try before the grid is extended.
        seeds: Seeds to run at the chosen rate.
    """
    places = [place - num_rates // 2 for place in range(num_rates)]
    found = {place: trials.run(make(_rate(guess, place), seeds[0])) for place in places}
    for _ in range(_EXTENSIONS if num_rates > 1 else 0):
        best = min(found, key=lambda place: _chosen_by(found[place]))
        beyond = {min(found): best - 1, max(found): best + 1}.get(best)
        if beyond is None:
            break
        found[beyond] = trials.run(make(_rate(guess, beyond), seeds[0]))
    best = min(found, key=lambda place: _chosen_by(found[place]))
    lr = _rate(guess, best)
    others = [trials.run(make(lr, seed)) for seed in seeds[1:]]
    return Choice(
        lr,
        (found[best], *others),
        (*found.values(), *others),
        at_edge=num_rates > 1 and best in (min(found), max(found)),
    )


def _rate(guess: float, place: int) -> float:
    """Returns a rate with four digits, so that it is the same number in every grid that contains it."""
    return float(f"{guess * FACTOR**place:.4g}")


def _chosen_by(score: Score) -> float:
    """Returns the loss on the groups that choose."""
    if score.failure is not None or not math.isfinite(score.loss):
        return math.inf
    return float(mean_losses([half_of(groups(score), 0)])[0])
