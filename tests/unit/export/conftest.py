"""A tiny Llama in the hub's layout, and an adapter for it that changes something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ingle import adapters, models
from ingle.config.adapter import LoraAdapter, QaLoraAdapter
from ingle.config.base import base_section
from ingle.config.model import ModelConfig
from tests.tiny import write_llama


@pytest.fixture(scope="session")
def llama_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_factory: Callable[..., PreTrainedTokenizerFast]
) -> Path:
    """Two layers, 256 wide, grouped queries, tied embeddings."""
    return write_llama(
        tmp_path_factory.mktemp("llama"),
        tokenizer_factory(eos="<|im_end|>"),
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.08,
    )


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Callable[..., Path]:
    """Writes a trained-looking adapter for the tiny Llama: ``make_adapter(size, **options of the adapter)``."""

    def make(size: float = 0.02, *, base: Any = "none", skip: tuple[str, ...] = (), **options: Any) -> Path:
        kind = QaLoraAdapter if options.get("kind") == "qa_lora" else LoraAdapter
        adapter = kind(rank=4, **options)
        model = models.load_model(ModelConfig(id=str(llama_folder), dtype="float32"), base_section(base))
        adapters.attach(model, adapter, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, layer in adapters.lora_modules(model).items():
                if not any(part in name for part in skip):
                    layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * size)
            for name, parameter in adapters.trainable_parameters(model):
                if "lora_" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        folder = tmp_path_factory.mktemp("adapter")
        adapters.save_adapter(
            model, folder, adapter, str(llama_folder), base=base_section(base), identity=adapters.identify(model)
        )
        return folder

    return make
