"""Token classification: a tag for each word, predicted at its first token.

Legend: N tokens, C tags.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ingle.data.batch import Batch
from ingle.data.types import IGNORE_INDEX
from ingle.models import forward_task
from ingle.objectives.driver import DocumentLoss
from ingle.objectives.interface import Sums
from ingle.objectives.token_loss import sum_documents


class TagLoss(DocumentLoss):
    """Sum of ``-log p(tag)`` over the words that have a tag, in nats."""

    unit = "labelled_words"

    def compute(self, batch: Batch) -> Sums:
        """Returns the sum over all words."""
        return Sums({"loss": self._losses(batch).sum()})

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the sum of each document and the number of its words; float64 [D, 2]."""
        return sum_documents(self._losses(batch), batch.columns["token_labels"][0] != IGNORE_INDEX, batch)

    def count(self, batch: Batch) -> float:
        """Returns the number of words with a tag."""
        return float(batch.num_supervised)

    def _losses(self, batch: Batch) -> Tensor:
        """Returns the loss at each token, [N]; 0 at tokens without a tag."""
        logits_NC = forward_task(self.model, batch)[0]
        logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
        labels_N = batch.columns["token_labels"][0]
        return functional.cross_entropy(logits_NC, labels_N, ignore_index=IGNORE_INDEX, reduction="none")
