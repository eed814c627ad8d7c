"""Training of encoder-decoders: the decoder predicts a target token by token from the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ingle.data.batch import Batch
from ingle.data.corruption import Target
from ingle.data.counters import Place
from ingle.data.types import Sample
from ingle.models import Model, first_token
from ingle.objectives.token_loss import TokenLoss


class TargetLoss(TokenLoss):
    """Sum of ``-log p(token | source, tokens before it in the target)`` over the targets, in nats."""

    unit = "target_tokens"
    bounds = "decoder_cu_seqlens"

    def targets(self, batch: Batch) -> Tensor:
        """Returns the target; the inputs of the decoder are shifted already."""
        return batch.columns["decoder_labels"][0]


#: Columns of documents that a target keeps.
_KEPT = ("scores", "truncated", "group_ids")


class Joining:
    """Joins sources and targets, which are adjacent documents; a row of several answers has a source for each.

    Args:
        target: How the decoder reads its target.
    """

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self, samples: Sequence[Sample], places: Sequence[Place]) -> Sequence[Sample]:
        """Returns one sample for every two documents."""
        sources, targets = samples[::2], samples[1::2]
        assert len(sources) == len(targets), "a source has no target"
        pairs = zip(sources, targets, strict=True)
        return [self._join(source, target) for source, target in pairs]

    def _join(self, source: Sample, target: Sample) -> Sample:
        joined = self._target.sample(source.input_ids, target.input_ids)
        if "scores" not in target.columns:
            return joined
        kept = {name: target.columns[name] for name in _KEPT if name in target.columns}
        return replace(joined, columns={**joined.columns, **kept})


def target_of(model: Model) -> Target:
    """Returns how the decoder of a model reads its target, as the model itself shifts a target.

    Raises:
        ModelError: The model does not say which token begins a target.
    """
    firsts = {_first_input(model, torch.tensor([labels])) for labels in ([5, 6, 7], [6, 7, 8])}
    if firsts == {7, 8}:
        return Target(start=None)
    first = firsts.pop()
    return Target(first_token(model) if first is None else first)


def _first_input(model: Any, labels: Tensor) -> int | None:
    """Returns the first input of the decoder for a target [1, T]; None if the model does not know it."""
    try:
        return int(model.prepare_decoder_input_ids_from_labels(labels)[0, 0])
    except (AttributeError, AssertionError, TypeError, ValueError):  # no such method, or no start token in the config
        return None
