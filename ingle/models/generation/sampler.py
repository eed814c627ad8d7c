"""Samples answers with continuous refill, over the layers of training.

A token step is one pass over a row of ``num_slots`` places, and prompts are read in passes over ``prefill_tokens``
places. Both numbers are constant, and places without a token compute something that nobody reads: so every product has
one shape, and its rows have the same bits whatever the other rows are. Attention reads the keys of a token's own text
in an order of its own. So a token depends on weights, prompt, seed, draw, answer and position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ingle.kernels.attention.cached import KeyStore
from ingle.models.forward.hidden_states import (
    device_of,
    forward_stored,
    logit_transform,
    why_nothing_is_stored,
)
from ingle.models.generation.batch_sampler import BatchSampler, raw_logits_of
from ingle.models.generation.decoding import evaluating, refuse_prompts
from ingle.models.generation.rollout import Draws, GrowingRollout, Request, Rollout, Sampler, Sampling
from ingle.models.generation.slots import Pass, Slots
from ingle.models.generation.stop_criteria import StopCriteria, end_token_ids
from ingle.models.text_limits import text_limit
from ingle.parallel import Mesh, all_gathered


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
    batches = BatchSampler(model, tokenizer, sampling, mesh)
    why = why_nothing_is_stored(model)
    if why is not None:
        batches.note = f"Answers are sampled in fixed batches, because {type(model).__name__} has no key store: {why}."
        return batches
    return SlotSampler(model, tokenizer, sampling, mesh, batches)


class SlotSampler:
    """The :class:`~ingle.models.generation.rollout.Sampler` with slots.

    Args:
        model: The model, with or without adapters.
        tokenizer: Its tokenizer.
        sampling: How answers are sampled.
        mesh: The ranks, if forward passes are collective.
        batches: Samples texts that are too long for unchanged rotary factors.
    """

    is_invariant = True
    note: str | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        sampling: Sampling,
        mesh: Mesh | None,
        batches: BatchSampler,
    ) -> None:
        self._model, self._tokenizer, self._sampling, self._mesh = model, tokenizer, sampling, mesh
        self._criteria = StopCriteria(tokenizer, sampling.stop, end_token_ids(model, tokenizer))
        self._batches = batches

    def run(self, requests: Iterable[Request], *, stop: Callable[[], bool]) -> Iterator[Rollout]:
        """Yields the answers as they finish."""
        model, requests = self._model, list(requests)
        refuse_prompts(model, self._tokenizer, [request.prompt for request in requests])
        with evaluating(model), nullcontext() if self._mesh is not None else all_gathered(model):
            yield from self._sample(requests, stop)

    def _sample(self, requests: Sequence[Request], stop: Callable[[], bool]) -> Iterator[Rollout]:
        slots = Slots(requests, self._begin, self._sampling.num_slots, self._sampling.prefill_tokens)
        store, longest = KeyStore(slots.num_rows), self._longest(requests)
        compute_logits = raw_logits_of(self._model)
        draws = Draws(self._sampling, logit_transform(self._model))
        while True:
            slots.enter()
            must_end, read_prompts, grow = self._agree(stop(), slots.needs_prompts, bool(slots.growing))
            if must_end or not (read_prompts or grow):
                return
            with torch.no_grad():
                if read_prompts:
                    self._forward(slots.prompt_pass(), longest, store)
                    continue
                over = _step(slots, compute_logits(self._forward(slots.token_pass(), longest, store)), draws)
            yield from over

    def _forward(self, tokens: Pass, longest: int, store: KeyStore) -> Tensor:
        """Returns the hidden states of a pass, ``[M, H]``."""
        store.begin(tokens.places)
        device = device_of(self._model)
        return forward_stored(self._model, tokens.ids.to(device), tokens.position_ids.to(device), longest, store)[0]

    def _begin(self, request: Request) -> GrowingRollout:
        limit = text_limit(self._model)
        return GrowingRollout(request, self._criteria, None if limit is None else limit - len(request.prompt))

    def _longest(self, requests: Sequence[Request]) -> int:
        return max((len(request.prompt) + request.max_new_tokens for request in requests), default=1)

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """Returns which flags are set on any rank."""
        return flags if self._mesh is None else tuple(map(any, zip(*self._mesh.gather(flags), strict=True)))


def _step(slots: Slots, logits_MV: Tensor, draws: Draws) -> list[Rollout]:
    """Adds a token to each answer; returns those that are complete."""
    growing = slots.growing
    if not growing:
        return []
    if len(growing) < len(logits_MV):
        logits_MV = logits_MV[torch.tensor(list(growing), device=logits_MV.device)]
    drawn = draws.draw(logits_MV, list(growing.values()))
    over = []
    for (index, answer), *figures in zip(growing.items(), *(values.tolist() for values in drawn), strict=True):
        if answer.add(*figures):
            over.append(answer.finish())
            slots.free(index)
    return over
