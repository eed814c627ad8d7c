"""Finds out whether an architecture generates with a cache what it computes without one, by trying a tiny copy of it.

Of the ways in :data:`_WAYS`, the first wins that gives each text of a batch what it gets alone, token by token, also
when another text of the batch has ended.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ingle.models.forward.hidden_states import forward_packed
from ingle.models.forward.layout import Layout, apply_layout
from ingle.models.forward.rotary_by_length import rotate_by_document
from ingle.models.generation.batches import PromptBatch
from ingle.models.generation.token_sampler import TokenSampler

#: Largest relative difference of a token's hidden states, in float32.
_TOLERANCE = 1e-4
_NUM_STEPS = 4
#: How a batch grows with a cache, from the fastest: ``Layout.pads_from``, and lengths of prompts for a trial.
_WAYS: tuple[tuple[int | None, tuple[int, ...]], ...] = ((0, (2, 14, 5, 9)), (8, (8, 14, 9, 11)), (None, (6, 6, 6)))


class _Given(TokenSampler):
    """Chooses given tokens, and keeps what the output layer would get."""

    def __init__(self, tokens_TD: Tensor) -> None:
        super().__init__(0.0, 1.0, 0, [])
        self.seen: list[tuple[list[int], Tensor]] = []
        self._tokens_TD = tokens_TD

    def choose(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the tokens of the next step."""
        self.seen.append((list(rows), logits_BV))
        return self._tokens_TD[len(self.seen) - 1, list(rows)]


def choose_caching(model: PreTrainedModel, layout: Layout, texts: Tensor) -> Layout:
    """Returns the layout with ``caches`` and ``pads_from``.

    Args:
        model: A small model; it is copied.
        layout: An exact layout of its architecture.
        texts: Some tokens, from which prompts are taken.
    """
    for pads_from, lengths in _WAYS:
        prompts = [texts[index : index + length] for index, length in enumerate(lengths)]
        try:
            exact = _grows_exactly(model, layout, prompts)
        except Exception:  # caches fail in many ways
            continue
        if exact:
            return replace(layout, caches=True, pads_from=pads_from)
    return replace(layout, caches=False, pads_from=0)


@torch.no_grad()
def _grows_exactly(model: PreTrainedModel, layout: Layout, prompts: Sequence[Tensor]) -> bool:
    model = copy.deepcopy(model)
    apply_layout(model, layout)
    rotate_by_document(model)
    tokens_TD = torch.stack([prompt[:2].repeat(_NUM_STEPS)[:_NUM_STEPS] for prompt in prompts], 1)
    given = _Given(tokens_TD)
    batch = PromptBatch(model, lambda hidden: hidden, [prompt.tolist() for prompt in prompts], given, 1 + _NUM_STEPS)
    for step in range(_NUM_STEPS):
        batch.step()
        if step == 1:
            batch.drop([1])
    for step, (rows, hidden_BH) in enumerate(given.seen):
        for place, row in enumerate(rows):
            text = torch.cat([prompts[row], tokens_TD[:step, row]])
            bounds = torch.tensor([0, len(text)], dtype=torch.int32)
            alone_H = forward_packed(model, text[None], torch.arange(len(text))[None], bounds)[0, -1]
            if (hidden_BH[place] - alone_H).norm() > _TOLERANCE * alone_H.norm():
                return False
    return True
