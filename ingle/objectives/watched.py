"""An objective whose forward passes fill an importance matrix on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ingle.data.types import Batch
from ingle.models import Model
from ingle.objectives.base import Objective
from ingle.quant.imatrix_collector import ImatrixCollector


class Watched:
    """Does what another objective does, and lets the inputs of its forward passes count; backward passes do not.

    Args:
        objective: The goal.
        collector: Watches the model.
    """

    def __init__(self, objective: Objective, collector: ImatrixCollector) -> None:
        self._objective = objective
        self._collector = collector

    def next_batch(self) -> Sequence[Batch]:
        """The micro-batches of the next step."""
        return self._objective.next_batch()

    def weight(self, batch: Batch) -> float:
        """What the loss of ``batch`` is a sum over."""
        return self._objective.weight(batch)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The loss of ``batch``; every token of it counts, supervised or not."""
        with self._collector.opened(batch.num_tokens):
            return self._objective.loss(model, batch)

    def metrics(self) -> dict[str, float]:
        """What else is worth logging about the last step."""
        return self._objective.metrics()

    def state_dict(self) -> dict[str, Any]:
        """All that decides which batches come next; what was gathered is the collector's."""
        return self._objective.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken."""
        self._objective.load_state_dict(state)
