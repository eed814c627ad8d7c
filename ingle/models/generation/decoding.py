"""Generates answers: batched decoding with a key-value cache.

Rows are padded on the left, so that all of them grow at the right end; a finished row is removed from the batch
immediately. Each prompt has its own stream of random numbers. An answer depends on the other prompts only where the
rounding of products does, which changes with the size of the batch: rarely in float32, often in bfloat16.
Encoder-decoders read prompts as sources: see :mod:`ingle.models.generation.target_batch`.

If a text grows beyond the length at which ``longrope`` changes its factors, its cached keys are recomputed, as
transformers does for Phi-3. ``dynamic`` positions change with every token, but cached keys are not recomputed, as in
transformers' ``generate``.

Legend: B rows, T tokens of a prompt, S cached tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from ingle.errors import ModelError
from ingle.models.forward.hidden_states import Head, device_of, head, through_head
from ingle.models.forward.mixers import base_of
from ingle.models.forward.rotary_by_length import key_change_lengths
from ingle.models.generation.stop_criteria import Answer, Generation, StopCriteria, end_token_ids
from ingle.models.generation.target_batch import TargetBatch
from ingle.models.generation.token_sampler import TokenSampler
from ingle.models.kinds import kind_of
from ingle.models.text_limits import refuse_tokens_beyond, text_limit
from ingle.parallel import is_unit


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> list[Generation]:
    """Answers each prompt.

    Args:
        model: A loaded model, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        max_new_tokens: Maximum length of an answer, in tokens.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: Sample from the most likely tokens that together reach this probability.
        seed: Sampling seed; prompt ``i`` uses the random stream ``(seed, streams[i])``.
        streams: Numbers of the random streams; ``0, 1, ...`` by default.
        stop: Strings that end an answer.
        batch_size: Prompts answered at once; prompts of similar length go together.
        on_progress: Called with the number of finished answers and the total.
        agree: Maps the tokens of a step to those of rank 0, if several ranks must make the same forward passes.

    Returns:
        One answer for each prompt, in order.

    Raises:
        ModelError: A prompt is empty, longer than the model's context, or has a token that the model lacks.
    """
    criteria = _check(model, tokenizer, prompts, stop)
    answers: list[Generation | None] = [None] * len(prompts)
    streams = range(len(prompts)) if streams is None else streams
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    done = 0
    with _evaluating(model):
        compute_logits, growing_batch = _logits_of(model), _batch_class(model)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            sampler = TokenSampler(temperature, top_p, seed, [streams[index] for index in chosen])
            sources = [prompts[index] for index in chosen]
            batch = growing_batch(model, compute_logits, sources, sampler, max_new_tokens, agree)
            growing = [Answer(criteria) for _ in chosen]
            while batch.rows:
                rows, tokens = batch.step()
                ended = [growing[row].add(token) for row, token in zip(rows, tokens, strict=True)]
                over = [row for row, end in zip(rows, ended, strict=True) if end or batch.is_full(row)]
                for row in over:
                    answers[chosen[row]] = growing[row].finish()
                    done += 1
                if on_progress is not None and over:
                    on_progress(done, len(prompts))
                batch.drop(over)
    return [answer for answer in answers if answer is not None]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Generator[str, None, Generation]:
    """Answers one prompt piece by piece; the joined pieces are what :func:`generate` returns.

    Text that a later token may change (an incomplete character, the beginning of a stop string) is held back.

    Returns:
        The complete answer, when the generator is exhausted.

    Raises:
        ModelError: The prompt is empty, longer than the model's context, or has a token that the model lacks.
    """
    answer = Answer(_check(model, tokenizer, [prompt], stop))
    shown = 0
    with _evaluating(model):
        sampler = TokenSampler(temperature, top_p, seed, [0])
        batch = _batch_class(model)(model, _logits_of(model), [prompt], sampler, max_new_tokens)
        over = False
        while not over:
            _, tokens = batch.step()
            over = answer.add(tokens[0]) or batch.is_full(0)
            text = answer.finish().text if over else answer.settled()
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
    return answer.finish()


def _check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]], stop: Sequence[str]
) -> StopCriteria:
    """Refuses prompts that cannot be answered, before the first is answered; returns the stop criteria."""
    limit = text_limit(model)
    answers_elsewhere = kind_of(model.config) == "encoder_decoder"
    for number, prompt in enumerate(prompts, 1):
        where = "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        if len(prompt) == 0:
            raise ModelError("A prompt has no tokens.", where=where, fix="give at least one word")
        if limit is not None and len(prompt) >= limit + answers_elsewhere:
            answer = "" if answers_elsewhere else ", including the answer"
            raise ModelError(
                "A prompt is longer than the model's context.",
                where=where,
                why=f"it has {len(prompt):,} tokens; the context has room for {limit:,}{answer}",
                fix="shorten the prompt",
            )
    refuse_tokens_beyond(model, max((max(prompt) for prompt in prompts), default=0), tokenizer)
    return StopCriteria(tokenizer, tuple(stop), end_token_ids(model, tokenizer))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients, and restores the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _logits_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Returns the output head as a function of ``[..., H]``; a quantized head is decoded once.

    The weights of a sharded head are freed after each call, so they are gathered, and decoded, in the next one.
    """
    if is_unit(model.get_output_embeddings()):
        return partial(through_head, model, Head.logits)
    return head(model).logits


def _batch_class(model: PreTrainedModel) -> type[_Batch] | type[TargetBatch]:
    return TargetBatch if kind_of(model.config) == "encoder_decoder" else _Batch


class _Batch:
    """A batch of prompts that grow by one token a step.

    Attributes:
        rows: Which prompts of the batch are still growing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compute_logits: Callable[[Tensor], Tensor],
        prompts: Sequence[Sequence[int]],
        sampler: TokenSampler,
        max_new_tokens: int,
        agree: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self._agree = agree
        self._lengths = lengths = [len(prompt) for prompt in prompts]
        limit = text_limit(model)
        self.rows = list(range(len(prompts)))
        self._model = model
        self._compute_logits = compute_logits
        self._sampler = sampler
        self._room = [min(max_new_tokens, limit - length) if limit else max_new_tokens for length in lengths]
        self._step = 0
        self._key_changes = key_change_lengths(model)
        self._cache = DynamicCache(config=model.config)
        device = device_of(model)
        width = max(lengths)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
        self._ids = torch.from_numpy(ids).to(device)
        self._texts = self._ids if self._key_changes else None
        padding = torch.tensor([width - length for length in lengths], device=device)
        steps = torch.arange(width, device=device)
        self._position_ids = (steps - padding[:, None]).clamp_min(0)
        # Attention is faster without a mask, which is not needed if no row is padded.
        self._mask = (steps >= padding[:, None]).long() if min(lengths) < width else None

    def is_full(self, row: int) -> bool:
        """Whether no further token fits into a row."""
        return self._step >= self._room[row]

    def step(self) -> tuple[list[int], list[int]]:
        """Adds one token to every row; returns the rows and their tokens."""
        last_BH = self._forward(self._ids, self._mask, self._position_ids, self._cache)
        if self._step and self._texts is not None:
            self._texts = torch.cat([self._texts, self._ids], dim=1)
            lengths = [self._lengths[row] + self._step for row in self.rows]
            crossing = [place for place, length in enumerate(lengths) if length - 1 in self._key_changes]
            if crossing:
                last_BH[crossing] = self._recompute(crossing, self._texts[crossing])
        tokens_B = self._sampler.choose(self._compute_logits(last_BH).float(), self.rows)
        if self._agree is not None:  # the last bits of logits may differ between devices
            tokens_B = torch.tensor(self._agree(tokens_B.tolist()), device=tokens_B.device)
        self._ids = tokens_B[:, None]
        self._position_ids = self._position_ids[:, -1:] + 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._step += 1
        return list(self.rows), tokens_B.tolist()

    def drop(self, rows: Sequence[int]) -> None:
        """Removes rows from the batch and the cache."""
        if not rows:
            return
        gone = set(rows)
        kept = [place for place, row in enumerate(self.rows) if row not in gone]
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            return
        index = torch.tensor(kept, device=self._ids.device)
        self._ids, self._position_ids = self._ids[index], self._position_ids[index]
        self._texts = None if self._texts is None else self._texts[index]
        self._mask = None if self._mask is None else self._mask[index]
        self._cache.batch_select_indices(index)

    def _forward(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Returns the hidden states of the last tokens, ``[B, H]``."""
        output = base_of(self._model)(
            input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        last: Tensor = output.last_hidden_state[:, -1]
        return last

    def _recompute(self, places: list[int], ids: Tensor) -> Tensor:
        """Recomputes the cached keys and values of full rows; returns the hidden states of their last tokens."""
        width = ids.shape[1]
        padding = width - 1 - self._position_ids[places, -1:]
        position_ids = (torch.arange(width, device=ids.device) - padding).clamp_min(0)
        fresh = DynamicCache(config=self._model.config)
        last_BH = self._forward(ids, None if self._mask is None else self._mask[places], position_ids, fresh)
        ours: Any
        new: Any
        for ours, new in zip(self._cache.layers, fresh.layers, strict=True):
            for name in ("keys", "values"):
                getattr(ours, name)[places] = getattr(new, name)
        return last_BH
