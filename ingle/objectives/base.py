"""What the training loop needs to know of a goal, and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ingle.data.types import Batch
from ingle.models import Model


class Objective(Protocol):
    """A source of batches and a loss that is a sum.

    The loop divides the summed loss of a step by the summed weight of the step over all micro-batches (and
    ranks), so how a step is cut into micro-batches cannot change its gradient.
    """

    def next_batch(self) -> Sequence[Batch]:
        """The micro-batches of the next step."""

    def weight(self, batch: Batch) -> float:
        """What the loss of ``batch`` is a sum over, e.g. its supervised tokens."""

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The loss of ``batch`` as a sum, a float32 scalar that can be differentiated."""

    def metrics(self) -> dict[str, float]:
        """What else is worth logging about the last step."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides which batches come next."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken."""
