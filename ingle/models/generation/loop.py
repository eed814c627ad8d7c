"""Answering: batched generation with a key-value cache.

Rows are padded on the left, so that all of them grow at the right end together; a row that is done leaves the batch
at once.  Each prompt draws from its own stream of random numbers, so an answer does not depend on what else is asked.

A text that grows past the length at which ``longrope`` takes other factors has its cached keys made anew, as
transformers does for Phi-3.  ``dynamic`` positions stretch with every token and the keys in the cache stay as they
were, which is what transformers' ``generate`` does too.

Legend: B rows, T tokens of a prompt, S cached tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from ingle.errors import ModelError
from ingle.models.forward.packed import Head, head
from ingle.models.forward.rotary_by_length import recomputed_beyond
from ingle.models.generation.answers import Answer, Generation, Rules
from ingle.models.generation.sampling import Draws
from ingle.models.limits import num_tokens, refuse_tokens_beyond, text_limit

#: The answer of a made-up conversation, rendered to find the end-of-turn token of a chat template.
_PROBE = "ingle"


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Answers each prompt.

    Args:
        model: A filled model, adapted or not.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token, else logits are divided by it.
        top_p: Sample from the likeliest tokens that together reach this probability.
        seed: Of the sampling; prompt ``i`` draws from the stream ``(seed, i)``.
        stop: Strings that end an answer.
        batch_size: Prompts answered at once; those of like length go together.
        on_progress: Called with the number of finished answers and that of all.

    Returns:
        One answer a prompt, in order.

    Raises:
        ModelError: When a prompt is empty, longer than the model can read, or has a token that the model lacks.
    """
    _refuse_lengths(model, prompts)
    rules = Rules(tokenizer, tuple(stop), end_token_ids(model, tokenizer))
    refuse_tokens_beyond(model, max((max(prompt, default=0) for prompt in prompts), default=0), tokenizer)
    answers: list[Generation | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    done = 0
    with _answering(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            draws = Draws(temperature, top_p, seed, chosen)
            decoding = _Decoding(model, [prompts[index] for index in chosen], draws, max_new_tokens)
            texts = [Answer(rules) for _ in chosen]
            while decoding.rows:
                rows, tokens = decoding.step()
                ended = [texts[row].add(token) for row, token in zip(rows, tokens, strict=True)]
                over = [row for row, end in zip(rows, ended, strict=True) if end or decoding.is_full(row)]
                for row in over:
                    answers[chosen[row]] = texts[row].finish()
                    done += 1
                if on_progress is not None and over:
                    on_progress(done, len(prompts))
                decoding.drop(over)
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
    """Answers one prompt piece by piece; the pieces joined are what :func:`generate` gives.

    Nothing is given out that a later token may take back: half a character, or the beginning of a stop string.

    Returns:
        The whole answer, when the generator is exhausted.

    Raises:
        ModelError: When the prompt is empty or longer than the model can read.
    """
    refuse_tokens_beyond(model, max(prompt, default=0), tokenizer)
    _refuse_lengths(model, [prompt])
    answer = Answer(Rules(tokenizer, tuple(stop), end_token_ids(model, tokenizer)))
    shown = 0
    with _answering(model):
        decoding = _Decoding(model, [prompt], Draws(temperature, top_p, seed, [0]), max_new_tokens)
        while decoding.rows:
            _, tokens = decoding.step()
            over = answer.add(tokens[0]) or decoding.is_full(0)
            text = answer.finish().text if over else answer.settled()
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if over:
                break
    return answer.finish()


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and the template's end of turn.

    Raises:
        ModelError: One of them is no token of the model.
    """
    found: set[int] = set()
    rows = num_tokens(model)
    for where, declared in (
        ("generation_config.json: eos_token_id", getattr(model.generation_config, "eos_token_id", None)),
        ("config.json: eos_token_id", getattr(model.config, "eos_token_id", None)),
        ("the tokenizer's eos_token", tokenizer.eos_token_id),
        ("the chat template's end of turn", _end_of_turn(tokenizer)),
    ):
        numbers = declared if isinstance(declared, list | tuple) else [] if declared is None else [declared]
        for number in numbers:
            if number == -1 and type(number) is int:
                continue  # some configs write "none" so
            if type(number) is not int or not 0 <= number < rows:
                raise ModelError(
                    "The token that ends an answer is not in the model's vocabulary.",
                    where=where,
                    why=f"it is {number!r}; the model has tokens from 0 to {rows - 1:,}",
                    fix="compare the file with the one that the model was published with",
                )
            found.add(number)
    return frozenset(found)


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token right after an answer in the rendered template, if there is one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template may refuse these turns; the declared tokens then stand alone
        return None
    _, _, tail = rendered.rpartition(_PROBE)
    ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
    first = ids[0] if ids else None
    known = tokenizer.added_tokens_decoder
    return first if first in known and known[first].special else None


@contextmanager
def _answering(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients, whatever the model was doing."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Decoding:
    """A batch of prompts that grow by one token a step.

    Attributes:
        rows: Which prompts of the batch are still growing.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], draws: Draws, max_new_tokens: int
    ) -> None:
        lengths = [len(prompt) for prompt in prompts]
        limit = text_limit(model)
        self.rows = list(range(len(prompts)))
        self._model = model
        self._head: Head = head(model)
        self._draws = draws
        self._room = [min(max_new_tokens, limit - length) if limit else max_new_tokens for length in lengths]
        self._step = 0
        self._lengths = lengths
        self._renewed_beyond = recomputed_beyond(model)
        self._cache = DynamicCache(config=model.config)
        device = self._head.weight.device
        width = max(lengths)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
        self._ids = torch.from_numpy(ids).to(device)
        self._texts = self._ids if self._renewed_beyond else None
        padding = torch.tensor([width - length for length in lengths], device=device)
        steps = torch.arange(width, device=device)
        self._position_ids = (steps - padding[:, None]).clamp_min(0)
        # No mask at all where no row is padded: attention then needs none.
        self._mask = (steps >= padding[:, None]).long() if min(lengths) < width else None

    def is_full(self, row: int) -> bool:
        """Whether no token more may be added to a row."""
        return self._step >= self._room[row]

    def step(self) -> tuple[list[int], list[int]]:
        """Adds one token to every row; gives the rows and their tokens."""
        output = self._model.base_model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._position_ids,
            past_key_values=self._cache,
            use_cache=True,
        )
        last_BH = output.last_hidden_state[:, -1]
        if self._step and self._texts is not None:
            self._texts = torch.cat([self._texts, self._ids], dim=1)
            lengths = [self._lengths[row] + self._step for row in self.rows]
            crossing = [place for place, length in enumerate(lengths) if length - 1 in self._renewed_beyond]
            if crossing:
                last_BH[crossing] = self._renew(crossing, self._texts[crossing])
        logits_BV = self._head.logits(last_BH).float()
        tokens_B = self._draws.choose(logits_BV, self.rows)
        self._ids = tokens_B[:, None]
        self._position_ids = self._position_ids[:, -1:] + 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._step += 1
        return list(self.rows), tokens_B.tolist()

    def _renew(self, places: list[int], ids: Tensor) -> Tensor:
        """Reads whole rows once more and puts their keys and values into the cache; gives the last hidden states."""
        width = ids.shape[1]
        padding = width - 1 - self._position_ids[places, -1:]
        fresh = DynamicCache(config=self._model.config)
        output = self._model.base_model(
            input_ids=ids,
            attention_mask=None if self._mask is None else self._mask[places],
            position_ids=(torch.arange(width, device=ids.device) - padding).clamp_min(0),
            past_key_values=fresh,
            use_cache=True,
        )
        ours: Any
        new: Any
        for ours, new in zip(self._cache.layers, fresh.layers, strict=True):
            for name in ("keys", "values"):
                getattr(ours, name)[places] = getattr(new, name)
        last: Tensor = output.last_hidden_state[:, -1]
        return last

    def drop(self, rows: Sequence[int]) -> None:
        """Takes rows out of the batch and of the cache."""
        if not rows:
            return
        gone = set(rows)
        kept = [place for place, row in enumerate(self.rows) if row not in gone]
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            return
        index = torch.tensor(kept, device=self._ids.device)
        self._cache.batch_select_indices(index)
        self._ids = self._ids[index]
        self._position_ids = self._position_ids[index]
        if self._texts is not None:
            self._texts = self._texts[index]
        if self._mask is not None:
            self._mask = self._mask[index]


def _refuse_lengths(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
    """Before anything is answered: a prompt that cannot be is found out at once, not after all the others."""
    limit = text_limit(model)
    for number, prompt in enumerate(prompts, 1):
        where = "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        if len(prompt) == 0:
            raise ModelError("A prompt has no tokens.", where=where, fix="give at least one word")
        if limit is not None and len(prompt) >= limit:
            raise ModelError(
                "A prompt is longer than the model's context.",
                where=where,
                why=f"it has {len(prompt):,} tokens, and the model holds {limit:,}, its answer included",
                fix="shorten the prompt",
            )
