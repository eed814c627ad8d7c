"""What the planner is told of a model is what attaching the adapter then makes of it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from ingle import adapters
from ingle.config import AdapterConfig, DataConfig, LoraAdapter, ModelConfig, NoAdapter, Run
from ingle.planning.memory import trainable_parameters
from ingle.training.model_shape import model_shape

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "adapter",
    [
        NoAdapter(kind="none"),
        LoraAdapter(rank=3),
        LoraAdapter(rank=3, target_modules=("q_proj", "layers.1.mlp.*")),
        LoraAdapter(rank=3, trainable_modules=("embed_tokens", "lm_head", "norm")),
    ],
    ids=["full", "all-linear", "patterns", "whole"],
)
def test_trained_parameters_are_foretold(adapter: AdapterConfig, tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    shape = model_shape(model, adapters.select(model, adapter))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    data = DataConfig(sources=[{"path": "d.jsonl"}])
    run = Run(model=ModelConfig(id="m"), data=data, adapter=adapter, output="o")
    assert trainable_parameters(run, shape) == adapters.attach(model, adapter, seed=0).trainable_parameters


def test_of_fused_experts_a_token_passes_through_the_chosen_ones() -> None:
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2))
    shape = model_shape(model, adapters.select(model, LoraAdapter()))
    by_size = {(linear.in_features, linear.out_features): linear for linear in shape.linears}
    up, down = by_size[32, 2 * 48], by_size[48, 32]
    assert [(each.count, each.active, each.adapted) for each in (up, down)] == [(12, 4, 0), (12, 4, 0)]
    assert shape.other_parameters == 2 * 64 * 32 + (2 * 2 + 1) * 32 + 2 * 6 * 32  # and two routers


def test_shared_layers_count_once_and_compute_often() -> None:
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    model = AlbertForMaskedLM(AlbertConfig(**sizes, vocab_size=64, num_hidden_layers=6))
    shape = model_shape(model, adapters.select(model, LoraAdapter()))
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    (feed_forward,) = (each for each in shape.linears if (each.in_features, each.out_features) == (32, 48))
    assert (feed_forward.count, feed_forward.active) == (1, 6)


def test_sizes_have_the_names_of_the_architecture() -> None:
    config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    model = DistilBertForMaskedLM(config)
    (layer,) = model_shape(model, adapters.select(model, LoraAdapter())).layers
    assert (layer.count, layer.num_heads, layer.head_dim) == (2, 4, 8)
