"""Chooses the sampler of a model."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ingle.models.generation.batch_sampler import BatchSampler
from ingle.models.generation.rollout import Sampler, Sampling
from ingle.parallel import Mesh


def make_sampler(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, *, mesh: Mesh | None = None
) -> Sampler:
    """Returns what samples answers of a model.

    Args:
        model: The model, loaded and wrapped, with or without adapters; the sampler always uses its current weights.
        tokenizer: Its tokenizer.
        sampling: How answers are sampled.
        mesh: The ranks, if forward passes are collective (sharded weights); None else.
    """
    return BatchSampler(model, tokenizer, sampling, mesh)
