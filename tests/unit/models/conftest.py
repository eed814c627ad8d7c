"""A tiny model and tokenizer; no test here needs the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 32


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> Iterator[None]:
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.enable_progress_bar()


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Every token from 4 on is one character; the first four are special."""
    names = ["<pad>", "<s>", "</s>", "<end>", *(chr(ord("a") + index) for index in range(VOCAB_SIZE - 4))]
    backend = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<pad>"))
    backend.decoder = Fuse()
    backend.add_special_tokens(names[:4])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def config() -> hf.LlamaConfig:
    return hf.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, config: hf.LlamaConfig) -> Path:
    """A checkpoint with a tokenizer; its weights are large enough that answers vary."""
    folder = tmp_path_factory.mktemp("model")
    model = hf.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    model.save_pretrained(folder)
    make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    from ingle import models
    from ingle.config import ModelConfig

    return models.load_model(ModelConfig(id=str(folder), dtype="float32"))
