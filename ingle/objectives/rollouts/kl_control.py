"""The weight of the divergence from the reference policy: fixed, towards a target, or within a budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from ingle.config.policy import KlControlKind

#: Iterations that the forecast is made from.
_MEMORY = 16
#: The target of a budget grows with this power of the share of the run: divergence grows fast at first.
_POWER = 0.5
#: The weight of a budget stays within this factor of where it began.
_RANGE = 100.0
#: Largest relative error that the weight reacts to.
_LARGEST_ERROR = 0.2
#: In how many iterations the weight of a budget can at most change by a fifth, e.g. 0.2 / 4 = 5 % in one.
_BUDGET_HORIZON = 4


class Point(NamedTuple):
    """The divergence that was measured in an iteration.

    Attributes:
        progress: Share of the run that was done, from 0 to 1.
        mean: Divergence per answer in nats.
        error: Its standard error.
    """

    progress: float
    mean: float
    error: float


class Interval(NamedTuple):
    """Where a value lies with 95 % probability."""

    low: float
    high: float


class KlControl:
    """Sets the weight of the divergence from the reference.

    Divergence is always that of whole answers: the mean over answers of the sum of ``log p - log q`` over their tokens,
    in nats. (verl divides it by the length.)

    - ``fixed``: the weight stays.
    - ``adaptive``: ``weight *= 1 + clip(D / target - 1, -0.2, 0.2) * answers / horizon``.
    - ``budget``: the same with a target that grows to the budget, ``budget * sqrt(share of the run)``, and a horizon of
      four iterations. The weight stays within a factor of 100.

    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences" (arXiv 1909.08593), section 2.2.

    Args:
        kind: As above.
        coef: The weight at the beginning, in units of the reward per nat.
        target: Divergence that ``adaptive`` aims at, in nats per answer.
        horizon: Answers in which the weight of ``adaptive`` can change by 20 %.
        budget: Divergence at the end of ``budget``, in nats per answer.

    Attributes:
        coef: The weight now.
    """

    def __init__(
        self,
        kind: KlControlKind,
        coef: float,
        *,
        target: float = 6.0,
        horizon: float = 10_000.0,
        budget: float | None = None,
    ) -> None:
        assert (kind == "budget") == (budget is not None), "a budget goes with control by budget"
        self.coef = coef
        self._kind = kind
        self._initial = coef
        self._target = target
        self._horizon = horizon
        self._budget = budget
        self._points: deque[Point] = deque(maxlen=_MEMORY)

    def update(self, mean: float, error: float, answers: int, progress: float) -> None:
        """Adds the divergence that was measured in an iteration, and sets the weight of the next one.

        Args:
            mean: Mean divergence of the answers, in nats.
            error: Its standard error.
            answers: Number of answers.
            progress: Share of the iterations that are done, this one included.
        """
        self._points.append(Point(progress, mean, error))
        if self._kind == "adaptive":
            self.coef *= 1 + _clip(mean / self._target - 1) * answers / self._horizon
        elif self._budget is not None:
            target = self._budget * max(progress, 0.0) ** _POWER
            factor = 1 + _clip(mean / target - 1) / _BUDGET_HORIZON if target > 0 else 1.0
            self.coef = min(max(self.coef * factor, self._initial / _RANGE), self._initial * _RANGE)

    @property
    def forecast(self) -> Interval | None:
        """The divergence at the end of the run if it goes on as in the last 16 iterations; None from fewer than 4.

        The prediction interval of a straight line through the points.
        """
        if len(self._points) < 4:
            return None
        x, y, _ = np.array(self._points).T
        x = x - 1.0  # distances from the end
        centred = x - x.mean()
        spread = float(centred @ centred)
        if spread == 0:
            return None
        slope = float(centred @ y) / spread
        end = float(y.mean() - slope * x.mean())
        residuals = y - end - slope * x
        freedom = len(y) - 2
        variance = float(residuals @ residuals) / freedom
        error = (variance * (1 + 1 / len(y) + float(x.mean()) ** 2 / spread)) ** 0.5
        width = float(stdtrit(freedom, 0.975)) * error
        return Interval(end - width, end + width)

    @property
    def is_exceeded(self) -> bool:
        """Whether the divergence measured last is beyond the budget, even less two standard errors."""
        if self._budget is None or not self._points:
            return False
        return self._points[-1].mean - 2 * self._points[-1].error > self._budget

    @property
    def is_within(self) -> bool:
        """Whether the divergence measured last is within the budget, even plus two standard errors."""
        if self._budget is None or not self._points:
            return True
        return self._points[-1].mean + 2 * self._points[-1].error <= self._budget

    def state_dict(self) -> dict[str, Any]:
        """Returns the weight and the points of the forecast, as plain values."""
        return {"coef": self.coef, "points": [list(point) for point in self._points]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.coef = float(state["coef"])
        self._points = deque((Point(*point) for point in state["points"]), maxlen=_MEMORY)


def _clip(error: float) -> float:
    return min(max(error, -_LARGEST_ERROR), _LARGEST_ERROR)
