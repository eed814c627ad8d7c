"""Decoding of encoder-decoders: sources are read once, and targets grow by one token a step.

Legend: B rows, S tokens of the longest source, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ingle.errors import ModelError
from ingle.models.forward.encoder_decoder import Row, encode
from ingle.models.forward.hidden_states import device_of
from ingle.models.forward.layout import layout_of
from ingle.models.forward.to_head import run_to_head
from ingle.models.generation.token_sampler import TokenSampler
from ingle.models.text_limits import text_limit


class TargetBatch:
    """A batch of sources, whose targets grow by one token a step from the token that begins a target.

    Attributes:
        rows: Which sources of the batch still have a growing target.
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
        limit = text_limit(model)
        self.rows = list(range(len(prompts)))
        self._model, self._compute_logits, self._sampler, self._agree = model, compute_logits, sampler, agree
        self._room = min(max_new_tokens, limit) if limit else max_new_tokens
        self._step = 0
        self._first = _forced_first(model)
        device = device_of(model)
        self._output_class, self._states, self._mask = _read(model, prompts, device)
        # Windows of the decoder do not concern the keys of the source.
        own = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._cache = EncoderDecoderCache(own, DynamicCache())
        self._ids = torch.full((len(prompts), 1), first_token(model), device=device)

    def is_full(self, row: int) -> bool:
        """Whether no further token fits into a row."""
        return self._step >= self._room

    def step(self) -> tuple[list[int], list[int]]:
        """Adds one token to every row; returns the rows and their tokens."""
        arguments = {
            "encoder_outputs": self._output_class(last_hidden_state=self._states),
            "attention_mask": self._mask,
            "decoder_input_ids": self._ids,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        last_BH = run_to_head(self._model, arguments)[:, -1]
        tokens_B = self._sampler.choose(self._compute_logits(last_BH).float(), self.rows)
        if self._step == 0 and self._first is not None:
            tokens_B = torch.full_like(tokens_B, self._first)
        if self._agree is not None:  # the last bits of logits may differ between devices
            tokens_B = torch.tensor(self._agree(tokens_B.tolist()), device=tokens_B.device)
        self._ids = tokens_B[:, None]
        self._step += 1
        return list(self.rows), tokens_B.tolist()

    def drop(self, rows: Sequence[int]) -> None:
        """Removes rows from the batch and the cache."""
        gone = set(rows)
        kept = [place for place, row in enumerate(self.rows) if row not in gone]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            return
        index = torch.tensor(kept, device=self._ids.device)
        self._ids, self._states, self._mask = self._ids[index], self._states[index], self._mask[index]
        self._cache.batch_select_indices(index)


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
    if layout_of(model).kind in ("rows", "equal_rows"):
        encoder: Any = model.get_encoder()
        outputs = [encoder(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])) for ids in sources]
        parts = [output.last_hidden_state[0] for output in outputs]
    else:
        outputs = [encode(model, Row.of(sources))]
        parts = list(outputs[0].last_hidden_state[0].split([len(ids) for ids in sources]))
    states: Tensor = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True)
    return type(outputs[0]), states, real
