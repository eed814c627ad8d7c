"""Language modelling: ``clm`` on every token, ``sft`` on the answers.

Both are the same sum of token losses; they differ in the mask that the data pipeline makes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ingle.data.batch import Batch
from ingle.data.counters import Place
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.objectives.token_loss import TokenLoss


class NextTokenLoss(TokenLoss):
    """Sum of ``-log p(token | tokens before it in its document)`` over the supervised tokens, in nats."""

    unit = "supervised_tokens"

    def targets(self, batch: Batch) -> Tensor:
        """Returns the label at t + 1 for the prediction at position t, inside each document."""
        return batch.next_labels()


def check_first_tokens(samples: Sequence[Sample], places: Sequence[Place]) -> Sequence[Sample]:
    """Returns the documents as they are. Nothing predicts their first tokens, so these must have no label."""
    assert all(sample.labels[0] == IGNORE_INDEX for sample in samples), "nothing predicts the first token of a document"
    return samples
