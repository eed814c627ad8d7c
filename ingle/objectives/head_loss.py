"""The loss of what a task head predicts: classes, tags and answers alike."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ingle.data.batch import Batch
from ingle.models import forward_task
from ingle.objectives.driver import DocumentLoss
from ingle.objectives.interface import Sums


class HeadLoss(DocumentLoss):
    """A sum over the documents or tokens that a head predicts something for."""

    @abstractmethod
    def losses(self, batch: Batch) -> Tensor:
        """Returns what is summed: the loss of each document, [D], or of each token, [N]."""

    def compute(self, batch: Batch) -> Sums:
        """Returns the sum over all documents."""
        return Sums({"loss": self.losses(batch).sum()})

    def outputs(self, batch: Batch) -> Tensor:
        """Returns the outputs of the head, see :func:`~ingle.models.forward_task`, at least in float32."""
        outputs = forward_task(self.model, batch)
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
