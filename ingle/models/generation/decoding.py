"""Generates answers: batched decoding with a key-value cache.

A finished row is removed from its batch immediately. Each prompt has its own stream of random numbers. An answer
depends on the other prompts only where the rounding of products does, which changes with the size of the batch: rarely
in float32, often in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ingle.errors import ModelError
from ingle.models.forward.hidden_states import Head, head, through_head
from ingle.models.forward.layout import layout_of
from ingle.models.generation.batches import GrowingBatch, PromptBatch, TargetBatch, UncachedBatch
from ingle.models.generation.stop_criteria import Answer, Generation, StopCriteria, end_token_ids
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
    with evaluating(model), torch.no_grad():
        compute_logits, growing_batch = _logits_of(model), batch_class(model)
        for chosen in batches(model, order, prompts, batch_size):
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
    with evaluating(model), torch.no_grad():
        sampler = TokenSampler(temperature, top_p, seed, [0])
        batch = batch_class(model)(model, _logits_of(model), [prompt], sampler, max_new_tokens)
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
    refuse_prompts(model, tokenizer, prompts)
    return StopCriteria(tokenizer, tuple(stop), end_token_ids(model, tokenizer))


def refuse_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]]
) -> None:
    """Refuses prompts that cannot be answered.

    Raises:
        ModelError: A prompt is empty, longer than the model's context, or has a token that the model lacks.
    """
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


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model into evaluation mode, and restores the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
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


def batch_class(model: PreTrainedModel) -> type[GrowingBatch]:
    """Returns how the texts of a model grow."""
    if kind_of(model.config) == "encoder_decoder":
        return TargetBatch
    return PromptBatch if layout_of(model).caches else UncachedBatch


def batches(
    model: PreTrainedModel, order: Sequence[int], prompts: Sequence[Sequence[int]], batch_size: int
) -> Iterator[list[int]]:
    """Yields the prompts in batches: those of ``order``, which is by length, as far as they can be padded."""
    pads_from = layout_of(model).pads_from
    batch: list[int] = []
    for index in order:
        length = len(prompts[index])
        shortest = len(prompts[batch[0]]) if batch else length
        can_join = shortest == length or (pads_from is not None and shortest >= pads_from)
        if len(batch) == batch_size or not can_join:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
