"""Language modelling: ``clm`` on every token, ``sft`` on the answers.

Both are the same sum of token losses; they differ in the mask that the data pipeline made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ingle.data.batch import collate, round_up
from ingle.data.dataset import TokenDataset
from ingle.data.packing import Indices
from ingle.data.sampler import SequenceSampler
from ingle.data.types import Batch
from ingle.kernels.layers.cross_entropy import linear_cross_entropy
from ingle.models import Model, forward_hidden, head


class LanguageModelling:
    """Next-token prediction over packed documents.

    Args:
        dataset: The tokenized documents.
        sampler: Gives the sequences; its state is one counter.
        global_batch_size: Sequences per step.
        micro_batch_size: Sequences per forward pass.
        device: Where the batches go.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sampler: SequenceSampler,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        device: torch.device,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._device = device
        self._counter = 0

    def next_batch(self) -> Sequence[Batch]:
        """The micro-batches of the next step; each is one padding-free row."""
        sequences = self._sampler.take(self._counter, self._global_batch_size)
        self._counter += self._global_batch_size
        size = self._micro_batch_size
        return [self._collate(sequences[start : start + size]) for start in range(0, len(sequences), size)]

    def _collate(self, sequences: Sequence[Indices]) -> Batch:
        documents = [self._dataset.sample(int(index)) for sequence in sequences for index in sequence]
        return round_up(collate(documents)).to(self._device)

    def weight(self, batch: Batch) -> float:
        """Supervised tokens."""
        return float(batch.num_supervised)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Sum of ``-log p(token | tokens before it in its document)`` over the supervised tokens, in nats.

        Position t predicts token t + 1; the first token of a document is never a target, so no prediction
        reaches across documents.
        """
        hidden_1NH = forward_hidden(model, batch)
        output = head(model)
        return linear_cross_entropy(
            hidden_1NH[0],
            output.weight,
            batch.targets(),
            bias=output.bias,
            logit_scale=output.logit_scale,
            softcap=output.softcap,
        )

    def metrics(self) -> dict[str, float]:
        """Nothing beyond the loss."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The sampler's counter."""
        return {"counter": self._counter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at a counter."""
        self._counter = int(state["counter"])
