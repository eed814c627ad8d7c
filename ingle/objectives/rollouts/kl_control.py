"""The weight of the divergence from the reference policy: fixed, towards a target, or within a budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from ingle.config.policy import KlControlKind

#: Iterations that the forecast is made from.
_MEMORY = 16
#: Largest relative error that ``adaptive`` reacts to.
_LARGEST_ERROR = 0.2
#: ``budget`` looks this many iterations ahead, along a line through as many points.
_LOOKAHEAD = 8
#: The most by which ``budget`` changes its weight in an iteration: it rises faster than it falls.
_FALL, _RISE = 0.125, 0.5
#: The weight of ``budget`` ends at most this much above the one that it began with.
_RANGE = 1000.0


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
    - ``budget``: at most ``budget`` at the end. The weight rises if the divergence, eight iterations ahead at its speed
      now, would be above ``(budget - 2 errors) sqrt(share of the run by then)``, and falls back to ``coef`` if it would
      be below. So ``coef`` holds as long as the budget is not in danger.

    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences" (arXiv 1909.08593), section 2.2.

    Args:
        kind: As above.
        coef: The weight at the beginning, in units of the reward per nat; above 0 for ``budget``.
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
        assert budget is None or coef > 0, "a weight of 0 cannot rise by a factor"
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
        assert 0 < progress <= 1, progress
        self._points.append(Point(progress, mean, error))
        if self._kind == "adaptive":
            relative = min(max(mean / self._target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
            self.coef *= 1 + relative * answers / self._horizon
        elif self._budget is not None:
            change = min(max((self._expected() / self._allowed() - 1) / 2, -_FALL), _RISE)
            self.coef = min(max(self.coef * (1 + change), self._initial), self._initial * _RANGE)

    def _ahead(self) -> float:
        """Returns the share of the run that the lookahead of ``budget`` takes."""
        recent = list(self._points)[-_LOOKAHEAD:]
        return _LOOKAHEAD * (recent[-1].progress - recent[0].progress) / max(len(recent) - 1, 1)

    def _expected(self) -> float:
        """Returns the divergence some iterations ahead, if it goes on as in the last ones."""
        recent = list(self._points)[-_LOOKAHEAD:]
        return recent[-1].mean if len(recent) < 3 else _Line(recent).at(recent[-1].progress + self._ahead())

    def _allowed(self) -> float:
        """Returns the divergence that the budget allows by then."""
        assert self._budget is not None
        last = self._points[-1]
        end = max(self._budget - 2 * last.error, self._budget / 2)
        return float(end * min(last.progress + self._ahead(), 1.0) ** 0.5)

    @property
    def forecast(self) -> Interval | None:
        """The divergence at the end of the run if it goes on as in the last 16 iterations; None from fewer than 4.

        The prediction interval of a straight line through the points.
        """
        if len(self._points) < 4:
            return None
        line = _Line(self._points)
        end, width = line.at(1.0), line.width(1.0)
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


class _Line:
    """The line through at least three points with the least squares.

    Args:
        points: Points at different shares of the run.
    """

    def __init__(self, points: Iterable[Point]) -> None:
        self._x, y, _ = np.array(list(points)).T
        self._centre, self._mean = float(self._x.mean()), float(y.mean())
        centred = self._x - self._centre
        self._spread = float(centred @ centred)
        self._slope = float(centred @ y) / self._spread
        residuals = y - self._mean - self._slope * centred
        self._freedom = len(y) - 2
        self._variance = float(residuals @ residuals) / self._freedom

    def at(self, x: float) -> float:
        """Returns the height of the line."""
        return self._mean + self._slope * (x - self._centre)

    def width(self, x: float) -> float:
        """Returns half the width of the interval in which a further point lies with 95 % probability."""
        share = 1 + 1 / len(self._x) + (x - self._centre) ** 2 / self._spread
        return float(stdtrit(self._freedom, 0.975) * (self._variance * share) ** 0.5)
