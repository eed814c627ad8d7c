"""Batches of texts that grow by one token a step: of prompts, and of targets whose sources are read once.

Prompts are padded on the left, so that all of them grow at the right end. If a text grows beyond the length at which
``longrope`` changes its factors, its cached keys are recomputed, as transformers does for Phi-3. ``dynamic`` positions
change with every token, but cached keys are not recomputed, as in transformers' ``generate``.

Legend: B rows, S tokens of the longest source, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ingle.errors import ModelError
from ingle.models.forward.encoder_decoder import Row, encode
from ingle.models.forward.hidden_states import device_of, forward_packed
from ingle.models.forward.layout import layout_of
from ingle.models.forward.mixers import base_of, original_class, parameters
from ingle.models.forward.rotary_by_length import key_change_lengths
from ingle.models.forward.to_head import run_to_head
from ingle.models.forward.virtual_tokens import num_added_keys, virtual_ids, virtual_length
from ingle.models.text_limits import text_limit


class Chooser(Protocol):
    """Chooses tokens."""

    def choose(self, logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the next token of each of these rows, ``[B]``."""


class GrowingBatch(ABC):
    """A batch of texts that grow by one token a step.

    Args:
        model: The model.
        compute_logits: Its output head, from [B, H].
        prompts: Tokens of each prompt.
        sampler: Chooses the tokens.
        max_new_tokens: Maximum length of an answer, in tokens.
        agree: Maps the tokens of a step to those of rank 0.

    Attributes:
        rows: Which prompts of the batch have an answer that still grows.
    """

    #: Tokens that the model reads next, [B, T].
    _ids: Tensor
    _cache: Any = None
    #: The first token of every answer, if the model fixes it.
    _first: int | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        compute_logits: Callable[[Tensor], Tensor],
        prompts: Sequence[Sequence[int]],
        sampler: Chooser,
        max_new_tokens: int,
        agree: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self._model, self._compute_logits, self._sampler, self._agree = model, compute_logits, sampler, agree
        self._step = 0
        self.rows = list(range(len(prompts)))
        limit = text_limit(model)
        begun = self._begin(prompts, device_of(model))
        self._room = [min(max_new_tokens, limit - length) if limit else max_new_tokens for length in begun]

    @abstractmethod
    def _begin(self, prompts: Sequence[Sequence[int]], device: torch.device) -> Sequence[int]:
        """Prepares the first step; returns how many tokens each text has before its answer."""

    @abstractmethod
    def _compute(self) -> Tensor:
        """Returns the hidden states of the last tokens, ``[B, H]``."""

    @abstractmethod
    def _advance(self) -> None:
        """Prepares the next step; called when each text has one more token."""

    @abstractmethod
    def _select(self, index: Tensor) -> None:
        """Keeps the rows at these places in all tensors but the next tokens and the cache."""

    def is_full(self, row: int) -> bool:
        """Whether no further token fits into a row."""
        return self._step >= self._room[row]

    def step(self) -> tuple[list[int], list[int]]:
        """Adds one token to every row; returns the rows and their tokens."""
        logits_BV = self._compute_logits(self._compute()).float()
        if self._step == 0 and self._first is not None:
            only = torch.full_like(logits_BV, -torch.inf)
            only[:, self._first] = 0.0
            logits_BV = only
        tokens_B = self._sampler.choose(logits_BV, self.rows)
        if self._agree is not None:  # the last bits of logits may differ between devices
            tokens_B = torch.tensor(self._agree(tokens_B.tolist()), device=tokens_B.device)
        self._ids = tokens_B[:, None]
        self._advance()
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
        self._ids = self._ids[index]
        self._select(index)
        if self._cache is not None:
            self._cache.reorder_cache(index)  # unlike batch_select_indices, it covers the states of mixers


class PromptBatch(GrowingBatch):
    """Prompts that a language model continues."""

    def _begin(self, prompts: Sequence[Sequence[int]], device: torch.device) -> Sequence[int]:
        given = [len(prompt) for prompt in prompts]
        self._lengths = [length + virtual_length(self._model) for length in given]
        prompts = [[*virtual_ids(self._model), *prompt] for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        self._key_changes = key_change_lengths(self._model)
        self._cache = DynamicCache(config=self._model.config)
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
        return given

    def _compute(self) -> Tensor:
        last_BH = self._forward(self._ids, self._mask, self._position_ids, self._cache)
        if self._step and self._texts is not None:
            self._texts = torch.cat([self._texts, self._ids], dim=1)
            lengths = [self._lengths[row] + self._step for row in self.rows]
            crossing = [place for place, length in enumerate(lengths) if length - 1 in self._key_changes]
            if crossing:
                last_BH[crossing] = self._recompute(crossing, self._texts[crossing])
        return last_BH

    def _advance(self) -> None:
        self._position_ids = self._position_ids[:, -1:] + 1
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)

    def _select(self, index: Tensor) -> None:
        self._position_ids = self._position_ids[index]
        self._texts = None if self._texts is None else self._texts[index]
        self._mask = None if self._mask is None else self._mask[index]

    def _forward(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Returns the hidden states of the last tokens, ``[B, H]``."""
        only_states = "cache_params" in parameters(original_class(base_of(self._model)))
        if only_states and self._step:
            mask = None  # a single token of a Mamba model is never padding, and its mask would be taken for its own
        arguments = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position_ids + layout_of(self._model).first_position + num_added_keys(self._model),
            "cache_params" if only_states else "past_key_values": cache,
            "use_cache": True,
        }
        return run_to_head(self._model, arguments)[:, -1]

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


class UncachedBatch(GrowingBatch):
    """Prompts that a language model continues, which are read again for each token."""

    def _begin(self, prompts: Sequence[Sequence[int]], device: torch.device) -> Sequence[int]:
        self._texts = [torch.tensor(prompt, device=device) for prompt in prompts]
        self._ids = torch.zeros(len(prompts), 0, dtype=torch.long, device=device)
        return [len(prompt) for prompt in prompts]

    def _compute(self) -> Tensor:
        row = Row.of(self._texts)
        hidden_1NH = forward_packed(self._model, row.ids, row.position_ids, row.cu_seqlens)
        return hidden_1NH[0, row.cu_seqlens[1:].long() - 1]

    def _advance(self) -> None:
        self._texts = [torch.cat([text, ids]) for text, ids in zip(self._texts, self._ids, strict=True)]

    def _select(self, index: Tensor) -> None:
        self._texts = [self._texts[place] for place in index.tolist()]


class TargetBatch(GrowingBatch):
    """Targets of sources, which begin with the token that the model begins a target with."""

    def _begin(self, prompts: Sequence[Sequence[int]], device: torch.device) -> Sequence[int]:
        self._first = _forced_first(self._model)
        self._output_class, self._states, self._mask = _read(self._model, prompts, device)
        # Windows of the decoder do not concern the keys of the source.
        own = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        self._cache = EncoderDecoderCache(own, DynamicCache())
        self._ids = torch.full((len(prompts), 1), first_token(self._model), device=device)
        return [0] * len(prompts)

    def _compute(self) -> Tensor:
        arguments = {
            "encoder_outputs": self._output_class(last_hidden_state=self._states),
            "attention_mask": self._mask,
            "decoder_input_ids": self._ids,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        return run_to_head(self._model, arguments)[:, -1]

    def _advance(self) -> None:
        """Does nothing: the model counts positions by its cache."""

    def _select(self, index: Tensor) -> None:
        self._states, self._mask = self._states[index], self._mask[index]


def first_token(model: PreTrainedModel) -> int:
    """Returns the token that begins a target.

    Raises:
        ModelError: The model does not name one.
    """
    decoder = model.config.get_text_config(decoder=True)
    for settings, name in (
        (model.generation_config, "decoder_start_token_id"),
        (model.config, "decoder_start_token_id"),
        (decoder, "decoder_start_token_id"),
        (decoder, "bos_token_id"),
        (model.config, "pad_token_id"),
    ):
        token = getattr(settings, name, None)
        if isinstance(token, int):
            return token
    raise ModelError(
        f"{type(model).__name__} does not say which token begins a target.",
        where="config.json",
        fix="add decoder_start_token_id to its config.json",
    )


def _forced_first(model: PreTrainedModel) -> int | None:
    """Returns the first token of every answer if the model fixes it, such as the language of a translation."""
    for settings in (model.generation_config, model.config):
        token = getattr(settings, "forced_bos_token_id", None)
        if isinstance(token, int):
            return token
    return None


def _read(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[type[ModelOutput], Tensor, Tensor]:
    """Returns the class of the encoder's output, its hidden states ``[B, S, H]``, and which are real, ``[B, S]``."""
    sources = [torch.tensor(prompt, device=device) for prompt in prompts]
    added = torch.tensor(virtual_ids(model), dtype=torch.long, device=device)
    if layout_of(model).kind in ("rows", "equal_rows"):
        encoder: Any = model.get_encoder()
        rows = [torch.cat((added, ids))[None] for ids in sources]
        outputs: list[Any] = [encoder(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in rows]
        parts = [output.last_hidden_state[0] for output in outputs]
    else:
        output, row = encode(model, Row.of(sources))
        outputs = [output]
        parts = list(outputs[0].last_hidden_state[0].split(row.lengths()))
    states: Tensor = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts], device=device)
    real = (torch.arange(states.shape[1], device=device) < lengths[:, None]).long()
    return type(outputs[0]), states, real
