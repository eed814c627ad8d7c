"""Language modelling: ``clm`` on every token, ``sft`` on the answers.

Both are the same sum of token losses; they differ in the mask that the data pipeline makes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ingle.data.batch import Batch
from ingle.data.counters import Place
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.models import Model, Routers
from ingle.objectives.interface import Sums, Term
from ingle.objectives.router_loss import balance_loss
from ingle.objectives.token_loss import TokenLoss


class NextTokenLoss(TokenLoss):
    """Sum of ``-log p(token | tokens before it in its document)`` over the supervised tokens, in nats.

    Args:
        model: The model that is trained.
        routers: Its routers, if their load is balanced: see :mod:`ingle.objectives.router_loss`.
        router_weight: Weight of the loss of the routers.
    """

    unit = "supervised_tokens"

    def __init__(self, model: Model, routers: Routers | None = None, router_weight: float = 0.0) -> None:
        super().__init__(model)
        self._routers = routers
        self._router_weight = router_weight
        self.uses_hooks = routers is not None

    @property
    def terms(self) -> Sequence[Term]:
        """The loss of the tokens, and that of the routers if their load is balanced."""
        return (*super().terms, *([Term("router_loss", "tokens", self._router_weight)] if self._routers else []))

    def compute(self, batch: Batch) -> Sums:
        """Returns the sum over all targets, and the load-balancing loss times the number of tokens."""
        if self._routers is None:
            return super().compute(batch)
        with self._routers.recorded() as logits:
            sums = super().compute(batch)
        balance = balance_loss(logits, self._routers.top_k, batch.num_tokens)
        return Sums({**sums.losses, "router_loss": balance * batch.num_tokens})

    def targets(self, batch: Batch) -> Tensor:
        """Returns the label at t + 1 for the prediction at position t, inside each document."""
        return batch.next_labels()


def check_first_tokens(samples: Sequence[Sample], places: Sequence[Place]) -> Sequence[Sample]:
    """Returns the documents as they are. Nothing predicts their first tokens, so these must have no label."""
    assert all(sample.labels[0] == IGNORE_INDEX for sample in samples), "nothing predicts the first token of a document"
    return samples
