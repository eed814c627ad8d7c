"""Token classification: a tag for each word, predicted at its first token.

Legend: N tokens.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ingle.data.batch import Batch
from ingle.data.types import IGNORE_INDEX
from ingle.objectives.head_loss import HeadLoss
from ingle.objectives.token_loss import sum_documents


class TagLoss(HeadLoss):
    """Sum of ``-log p(tag)`` over the words that have a tag, in nats."""

    unit = "labelled_words"

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the sum of each document and the number of its words; float64 [D, 2]."""
        return sum_documents(self.losses(batch), batch.columns["token_labels"][0] != IGNORE_INDEX, batch)

    def losses(self, batch: Batch) -> Tensor:
        """Returns the loss at each token, [N]; 0 at tokens without a tag."""
        labels_N = batch.columns["token_labels"][0]
        return functional.cross_entropy(self.outputs(batch)[0], labels_N, ignore_index=IGNORE_INDEX, reduction="none")
