"""Dropout of an architecture is turned off, whether it is a module or a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ingle.adapters import attach, lora_modules
from ingle.config.adapter import LoraAdapter
from ingle.models.forward.dropout import disable_dropout

_BART = transformers.BartConfig(
    vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.5, activation_dropout=0.5, attention_dropout=0.5,
    max_position_embeddings=32,
)  # fmt: skip
_GPT2 = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(transformers.BartForConditionalGeneration, _BART), (transformers.GPT2LMHeadModel, _GPT2)],
)
def test_two_passes_in_training_mode_are_equal(kind: Any, config: Any) -> None:
    torch.manual_seed(0)
    model = kind(config).train()
    ids = torch.arange(1, 9)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert disable_dropout(model) > 0
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert disable_dropout(model) == 0


def test_the_dropout_of_an_adapter_stays() -> None:
    model = transformers.GPT2LMHeadModel(_GPT2)
    attach(model, LoraAdapter(kind="lora", rank=2, dropout=0.25), seed=0)
    disable_dropout(model)
    assert {layer.dropout for layer in lora_modules(model).values()} == {0.25}
