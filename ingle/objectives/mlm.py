"""Masked language modelling: restores the tokens that :class:`ingle.data.corruption.Masking` hides."""

from __future__ import annotations

from torch import Tensor

from ingle.data.batch import Batch
from ingle.objectives.token_loss import TokenLoss


class MaskedTokenLoss(TokenLoss):
    """Sum of ``-log p(token | its document with tokens hidden)`` over the chosen tokens, in nats.

    Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 3.1.
    """

    unit = "masked_tokens"

    def targets(self, batch: Batch) -> Tensor:
        """Returns the hidden tokens, each at its own position."""
        return batch.labels[0]
