"""Extractive question answering: the first and the last token of the answer in a window of the context.

Legend: D windows, T tokens of the longest one, N tokens of all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ingle.data.batch import Batch
from ingle.data.types import IGNORE_INDEX
from ingle.objectives.head_loss import HeadLoss


class AnswerLoss(HeadLoss):
    """Mean of ``-log p(first token)`` and ``-log p(last token)``, summed over windows, in nats.

    The probabilities are over the tokens of the window itself. In a padded batch, transformers also counts the padding.

    Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 4.2.
    """

    unit = "windows"

    def per_document(self, batch: Batch) -> Tensor:
        """Returns the loss of each window, and whether it has a label; float64 [D, 2]."""
        labels_D = batch.columns["start_labels"][: batch.num_documents]
        return torch.stack([self.losses(batch).double(), (labels_D != IGNORE_INDEX).double()], 1)

    def losses(self, batch: Batch) -> Tensor:
        """Returns the loss of each window, [D]."""
        logits_DT2 = _rows(self.outputs(batch)[0], batch)[: batch.num_documents]
        sides = [
            functional.cross_entropy(
                logits_DT2[..., side],
                batch.columns[f"{name}_labels"][: batch.num_documents],
                ignore_index=IGNORE_INDEX,
                reduction="none",
            )
            for side, name in enumerate(("start", "end"))
        ]
        return (sides[0] + sides[1]) / 2


def _rows(values_N2: Tensor, batch: Batch) -> Tensor:
    """Returns the values of each document in a row of its own, with -inf behind its end."""
    lengths_D = batch.cu_seqlens.diff().long()
    documents_N = torch.repeat_interleave(torch.arange(len(lengths_D), device=lengths_D.device), lengths_D)
    rows_DT2 = values_N2.new_full((len(lengths_D), int(lengths_D.max()), 2), -torch.inf)
    return rows_DT2.index_put((documents_N, batch.position_ids[0]), values_N2)
