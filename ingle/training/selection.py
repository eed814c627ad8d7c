"""Which step of a run is kept, and when the run stops: a function of the validation losses, equal on all ranks.

Losses are compared by groups of rows: rows that share a prompt or nearly repeat one another are not independent.

Legend: G groups of held-out documents; a table [G, 2] has the sum of the loss and its denominator for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ingle.config.train import EarlyStopping
from ingle.report.results import ValidationPoint

#: State values of a run without validations.
_NEVER = -1


def mean_loss(table_G2: Tensor) -> float:
    """Returns the loss per unit of a table."""
    total, count = table_G2.sum(0).tolist()
    return float(total / (count or 1.0))


def paired_difference(old_G2: Tensor, new_G2: Tensor) -> tuple[float, float]:
    """Returns how much higher the old loss is than the new one, and the standard error of the difference.

    The standard error is that of a ratio of sums over groups, ``sum(old - new) / sum(count)``; infinite for one group.

    Source: Cochran 1977, "Sampling Techniques", equation 6.13, without the correction for a finite population.
    """
    saved_G, count_G = old_G2[:, 0] - new_G2[:, 0], new_G2[:, 1]
    total = float(count_G.sum()) or 1.0
    difference = float(saved_G.sum()) / total
    num = len(saved_G)
    if num < 2:
        return difference, math.inf
    residual_G = saved_G - difference * count_G
    return difference, math.sqrt(num / (num - 1) * float(residual_G.square().sum())) / total


class Selection:
    """The validations so far, the best of them, and whether the run should stop.

    The best step has the lowest loss, the first one of equals. Early stopping counts validations without a gain over
    the last step whose gain counted, not over the best step: so many small gains add up to one that counts.

    Args:
        stopping: When the run stops; None for never.

    Attributes:
        history: All validations, in order.
        best_step: The step with the lowest loss; -1 before the first validation.
    """

    def __init__(self, stopping: EarlyStopping | None = None) -> None:
        self._stopping = stopping
        self.history: list[ValidationPoint] = []
        self.best_step = _NEVER
        self._num_without_gain = 0
        self._best_G2 = self._reference_G2 = torch.zeros(0, 2, dtype=torch.float64)
        self._ends: list[Tensor] = []

    @property
    def step(self) -> int:
        """The last validated step; -1 before the first validation."""
        return self.history[-1].step if self.history else _NEVER

    @property
    def best_loss(self) -> float:
        """The loss of the best step."""
        return next(point.loss for point in self.history if point.step == self.best_step)

    @property
    def should_stop(self) -> bool:
        """Whether the loss has not fallen for ``early_stopping.patience`` validations."""
        return self._stopping is not None and self._num_without_gain >= self._stopping.patience

    def add(self, step: int, table_G2: Tensor, metrics: Mapping[str, float] | None = None) -> ValidationPoint:
        """Adds the validation of a step, after all earlier steps.

        Args:
            step: Optimizer steps made.
            table_G2: Sum and denominator of the loss of each group, float64, [G, 2].
            metrics: Further figures of the step.
        """
        loss = mean_loss(table_G2)
        self._ends = [*self._ends[:1], table_G2]
        is_first = not self.history
        if is_first or loss < mean_loss(self._best_G2):
            self._best_G2, self.best_step = table_G2, step
        gain, gain_stderr = (None, None) if is_first else paired_difference(self._reference_G2, table_G2)
        rise, rise_stderr = paired_difference(table_G2, self._best_G2)
        if gain is None or gain_stderr is None or gain > self._least_gain(gain_stderr):
            self._reference_G2, self._num_without_gain = table_G2, 0
        else:
            self._num_without_gain += 1
        point = ValidationPoint(
            step=step,
            loss=loss,
            gain=gain,
            gain_stderr=_finite(gain_stderr),
            rise=rise,
            rise_stderr=_finite(rise_stderr),
            metrics=dict(metrics or {}),
        )
        self.history.append(point)
        return point

    def _least_gain(self, stderr: float) -> float:
        given = None if self._stopping is None else self._stopping.min_delta
        return stderr if given is None else given

    def state_dict(self) -> dict[str, Any]:
        """Returns the history as plain values, and the tables of the best, the first and the last step as tensors."""
        ends = {f"end_{number}": table.clone() for number, table in enumerate(self._ends)}
        return {
            **ends,
            "history": [asdict(point) for point in self.history],
            "best_step": self.best_step,
            "num_without_gain": self._num_without_gain,
            "best": self._best_G2,
            "reference": self._reference_G2.clone(),  # a file cannot have one tensor under two names
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.history = [ValidationPoint(**point) for point in state["history"]]
        self.best_step = int(state["best_step"])
        self._num_without_gain = int(state["num_without_gain"])
        self._best_G2, self._reference_G2 = state["best"], state["reference"]
        self._ends = [state[name] for name in ("end_0", "end_1") if name in state]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
