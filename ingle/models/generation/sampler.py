"""Samples answers with continuous refill, over the layers of training.

A token step is one pass over a row of ``num_slots`` places, and prompts are read in passes over ``prefill_tokens``
places. Both numbers are constant, and places without a token compute something that nobody reads: so every product has
one shape, and its rows have the same bits whatever the other rows are. Smaller passes are used where they were found to
have the same bits. Attention reads the keys of a token's own text
in an order of its own. So a token depends on weights, prompt, seed, draw, answer and position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ingle.models.forward.hidden_states import logit_transform, why_nothing_is_stored
from ingle.models.forward.rotary_by_length import unchanged_length
from ingle.models.generation.batch_sampler import BatchSampler
from ingle.models.generation.decoding import evaluating, refuse_prompts
from ingle.models.generation.passes import Findings, Passes, try_passes
from ingle.models.generation.rollout import Draws, GrowingRollout, Request, Rollout, Sampler, Sampling
from ingle.models.generation.slots import Slots
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

    Before its first answer it tries some passes. If they are wrong, answers are sampled in fixed batches.

    Args:
        model: The model, with or without adapters.
        tokenizer: Its tokenizer.
        sampling: How answers are sampled.
        mesh: The ranks, if forward passes are collective.
        batches: Samples what has no right passes.
    """

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

    @property
    def is_invariant(self) -> bool:
        """Whether the passes were found to be right and invariant; collective where passes are.

        Texts for which rotary factors change are sampled in fixed batches, so their model is not.
        """
        return self._findings.is_right and self._findings.is_invariant and math.isinf(unchanged_length(self._model))

    @property
    def note(self) -> str | None:
        """What was found to be wrong."""
        name = type(self._model).__name__
        if not self._findings.is_right:
            return f"Answers are sampled in fixed batches, because {name} computes something else with a key store."
        if not self._findings.is_invariant:
            return f"The last bits of {name} depend on which answers grow together, so a resumed rollout is repeated."
        return None

    @cached_property
    def _findings(self) -> Findings:
        with self._ready():
            found = try_passes(self._model, self._sampling, self._criteria)
        if self._mesh is None:
            return found
        of_all = self._mesh.gather(found)
        sizes = set[int](found.sizes).intersection(*(each.sizes for each in of_all))
        return Findings(
            all(each.is_right for each in of_all), all(each.is_invariant for each in of_all), tuple(sorted(sizes))
        )

    def run(self, requests: Iterable[Request], *, stop: Callable[[], bool]) -> Iterator[Rollout]:
        """Yields the answers as they finish."""
        requests = list(requests)
        refuse_prompts(self._model, self._tokenizer, [request.prompt for request in requests])
        longest = max((len(request.prompt) + request.max_new_tokens for request in requests), default=1)
        (changes,) = self._agree(longest > unchanged_length(self._model))
        if changes or not self._findings.is_right:
            yield from self._batches.run(requests, stop=stop)
            return
        with self._ready():
            yield from self._sample(requests, longest, stop)

    def _sample(self, requests: Sequence[Request], longest: int, stop: Callable[[], bool]) -> Iterator[Rollout]:
        slots = Slots(requests, self._begin, self._sampling.num_slots, self._sampling.prefill_tokens)
        passes = Passes(self._model, slots, longest)
        draws = Draws(self._sampling, logit_transform(self._model))
        while True:
            slots.enter()
            growing = slots.growing
            must_end, read_prompts, grow = self._agree(stop(), slots.needs_prompts, bool(growing))
            if must_end or not (read_prompts or grow):
                return
            with torch.no_grad():
                if read_prompts:
                    passes.hidden(slots.prompt_pass())
                    continue
                size = next(size for size in self._findings.sizes if size >= len(growing))
                logits_MV = passes.logits(passes.hidden(slots.token_pass(list(growing), size)))[: len(growing)]
                over = [] if not growing else draws.add(logits_MV, growing)
            for index in over:
                slots.free(index)
                yield growing[index].finish()

    def _begin(self, request: Request) -> GrowingRollout:
        limit = text_limit(self._model)
        return GrowingRollout(request, self._criteria, None if limit is None else limit - len(request.prompt))

    @contextmanager
    def _ready(self) -> Iterator[None]:
        with evaluating(self._model), nullcontext() if self._mesh is not None else all_gathered(self._model):
            yield

    def _agree(self, *flags: bool) -> tuple[bool, ...]:
        """Returns which flags are set on any rank."""
        return flags if self._mesh is None else tuple(map(any, zip(*self._mesh.gather(flags), strict=True)))
