"""The loss of predicting tokens with the output head, next tokens and hidden ones alike."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ingle.data.batch import Batch
from ingle.data.types import IGNORE_INDEX
from ingle.kernels.layers.cross_entropy import linear_cross_entropy
from ingle.kernels.layers.token_logps import token_logps
from ingle.models import Head, forward_hidden, through_head
from ingle.objectives.driver import DocumentLoss
from ingle.objectives.interface import Sums


class TokenLoss(DocumentLoss):
    """Sum of ``-log p(target)`` over the positions of a row that have a target, in nats.

    Attributes:
        bounds: The column with the bounds of the documents in the row of the targets.
    """

    reads_head_in_backward = False  # the gradient is computed with the loss
    bounds = "cu_seqlens"

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """Returns the token that each position predicts, int64 [N]; ``IGNORE_INDEX`` where there is none."""

    def compute(self, batch: Batch) -> Sums:
        """Returns the sum over all targets."""
        hidden_1NH = forward_hidden(self.model, batch)
        return Sums({"loss": through_head(self.model, _cross_entropy, hidden_1NH[0], self.targets(batch))})

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the sum of each document in nats, and the number of its targets; float64 [D, 2]."""
        hidden_1NH = forward_hidden(self.model, batch)
        targets_N = self.targets(batch)
        losses_N = -through_head(self.model, head_logps, hidden_1NH[0], targets_N)
        return sum_documents(losses_N, targets_N != IGNORE_INDEX, batch, self.bounds)


def sum_documents(losses_N: Tensor, counted_N: Tensor, batch: Batch, bounds: str = "cu_seqlens") -> Tensor:
    """Returns the sums of losses and of counts over the tokens of each document, float64 [D, 2].

    The document that :func:`~ingle.data.round_up` adds is left out.
    """
    # On the CPU, since a GPU adds in no fixed order, and a resumed run must reach the same decisions.
    values_N2 = torch.stack([losses_N.double(), counted_N.double()], 1).cpu()
    lengths_D = batch.columns[bounds].diff().long().cpu()
    documents_N = torch.repeat_interleave(torch.arange(len(lengths_D)), lengths_D)
    sums_D2 = values_N2.new_zeros(len(lengths_D), 2).index_add_(0, documents_N, values_N2)
    return sums_D2[: batch.num_documents]


def _cross_entropy(output: Head, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    return linear_cross_entropy(
        hidden_NH,
        output.weight,
        labels_N,
        bias=output.bias,
        logit_scale=output.logit_scale,
        softcap=output.softcap,
    )


def head_logps(output: Head, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """Returns the log-probability that the output layer gives each label, in nats: from [N, H] and [N], float32 [N]."""
    return token_logps(
        hidden_NH,
        output.weight,
        labels_N,
        bias=output.bias,
        logit_scale=output.logit_scale,
        softcap=output.softcap,
    )
