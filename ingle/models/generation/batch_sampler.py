"""Samples answers in fixed batches, for every architecture that generates.

It is slower than :mod:`ingle.models.generation.sampler`, and rounding may depend on the other rows of a batch.

Legend: B rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ingle.models.forward.hidden_states import Head, head, logit_transform, through_head
from ingle.models.generation.decoding import batch_class, batches, evaluating, refuse_prompts
from ingle.models.generation.rollout import Draws, GrowingRollout, Request, Rollout, Sampling
from ingle.models.generation.stop_criteria import StopCriteria, end_token_ids
from ingle.models.kinds import kind_of
from ingle.models.text_limits import text_limit
from ingle.parallel import Mesh, is_unit


class BatchSampler:
    """A :class:`~ingle.models.generation.rollout.Sampler` over fixed batches.

    Args:
        model: The model, with or without adapters.
        tokenizer: Its tokenizer.
        sampling: How answers are sampled.
        mesh: The ranks, if forward passes are collective; each rank then computes the answers of all.
        note: Why this sampler is used.
    """

    is_invariant = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        sampling: Sampling,
        mesh: Mesh | None = None,
        note: str | None = None,
    ) -> None:
        self._model, self._tokenizer, self._sampling, self._mesh = model, tokenizer, sampling, mesh
        self._criteria = StopCriteria(tokenizer, sampling.stop, end_token_ids(model, tokenizer))
        self.note = note

    def run(self, requests: Iterable[Request], *, stop: Callable[[], bool]) -> Iterator[Rollout]:
        """Yields the answers as they finish, shorter prompts first."""
        model = self._model
        own = list(requests)
        parts = [own] if self._mesh is None else self._mesh.gather(own)
        everything = [request for part in parts for request in part]
        start = 0 if self._mesh is None else sum(map(len, parts[: self._mesh.dist_rank]))
        prompts = [request.prompt for request in everything]
        refuse_prompts(model, self._tokenizer, prompts)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        with evaluating(model):
            compute_logits, growing_batch = raw_logits_of(model), batch_class(model)
            for chosen in batches(model, order, prompts, self._sampling.num_slots):
                growing = [
                    GrowingRollout(everything[index], self._criteria, self._room(prompts[index])) for index in chosen
                ]
                chooser = _Race(growing, Draws(self._sampling, logit_transform(model)))
                longest = max(everything[index].max_new_tokens for index in chosen)
                with torch.no_grad():
                    batch = growing_batch(model, compute_logits, [prompts[index] for index in chosen], chooser, longest)
                while batch.rows:
                    if self._must_end(stop):
                        return
                    with torch.no_grad():
                        rows, _ = batch.step()
                        over = [row for row in rows if chooser.is_over[row]]
                        batch.drop(over)
                    yield from (growing[row].finish() for row in over if start <= chosen[row] < start + len(own))

    def _room(self, prompt: Sequence[int]) -> int | None:
        limit = text_limit(self._model)
        if limit is None or kind_of(self._model.config) == "encoder_decoder":
            return limit
        return limit - len(prompt)

    def _must_end(self, stop: Callable[[], bool]) -> bool:
        return stop() if self._mesh is None else self._mesh.agree(stop())


class _Race:
    """Draws tokens for the rows of a batch, and adds them to their answers."""

    def __init__(self, growing: Sequence[GrowingRollout], draws: Draws) -> None:
        self._growing, self._draws = growing, draws
        self.is_over = [False] * len(growing)

    def choose(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the next token of each row, ``[B]``."""
        growing = [self._growing[row] for row in rows]
        drawn = self._draws.draw(logits_BV, growing)
        figures = (values.tolist() for values in drawn)
        for row, answer, token, logp, entropy in zip(rows, growing, *figures, strict=True):
            self.is_over[row] = answer.add(token, logp, entropy)
        return drawn.tokens


def raw_logits_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Returns the product of the output head, before scales and bounds; a quantized head is decoded once.

    The weights of a sharded head are freed after each call, so they are gathered, and decoded, in the next one.
    """
    if is_unit(model.get_output_embeddings()):
        return partial(through_head, model, _raw_logits)
    return partial(_raw_logits, head(model))


def _raw_logits(output: Head, hidden_BH: Tensor) -> Tensor:
    logits_BV = hidden_BH @ output.weight.detach().to(hidden_BH.dtype).t()
    return logits_BV if output.bias is None else logits_BV.add_(output.bias.detach().to(hidden_BH.dtype))
