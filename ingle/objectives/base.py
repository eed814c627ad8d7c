"""The interface between the training loop and an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ingle.data.batch import Batch
from ingle.models import Model


class Term(NamedTuple):
    """One term of a loss.

    Attributes:
        name: Its key in :attr:`Sums.losses`.
        denominator: The count (a key of :meth:`Objective.count`) that its sum is divided by.
        weight: Factor on the mean.
    """

    name: str
    denominator: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over one micro-batch.  Those of a step are the sums over its micro-batches and ranks.

    Attributes:
        losses: Scalar of each term, float32, differentiable.
        metrics: Further scalars to log, detached.
    """

    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class StepModule(nn.Module, ABC):
    """Everything that a step computes: encoder, head and loss.

    All weights are read inside ``forward``, so that hooks on this module (DDP, FSDP) see every weight that is used.

    Args:
        model: The model that is trained.

    Attributes:
        observe: Called with the number of real tokens of each micro-batch; its context surrounds the forward pass.
    """

    observe: Callable[[int], AbstractContextManager[None]]

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.observe = lambda num_tokens: nullcontext()

    def forward(self, batch: Batch) -> Sums:
        """Computes the sums of one micro-batch."""
        with self.observe(batch.num_tokens):
            return self.compute(batch)

    @abstractmethod
    def compute(self, batch: Batch) -> Sums:
        """Computes the sums of one micro-batch; called by ``forward``."""


class Objective(Protocol):
    """Supplies batches and the module that turns them into sums.

    The loop divides the sum of each term by the count of its denominator over the whole step: all micro-batches and
    all ranks.  So the way a step is cut into micro-batches does not change its gradient.
    """

    @property
    def module(self) -> StepModule:
        """The module whose ``forward`` returns the sums of a micro-batch."""

    @property
    def terms(self) -> Sequence[Term]:
        """The terms of the loss."""

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def next_batches(self) -> Sequence[Batch]:
        """Returns the micro-batches of the next step."""

    def count(self, batch: Batch) -> dict[str, float]:
        """Returns what the denominators of the terms, and of the metrics, count in a micro-batch."""

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Returns what to log of a step besides the loss, from its sums and counts."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what decides which batches come next: plain values, and tensors if there are any."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
