"""Compares tensor names with the ``gguf`` package and the order of rows with llama.cpp's formula."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ingle.errors import GgufError
from ingle.gguf.families import BY_MODEL_TYPE, family_of_metadata
from ingle.gguf.names import names_of
from tests.tiny import PLAIN_DECODERS

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("model_type", PLAIN_DECODERS)
def test_every_weight_has_the_name_that_the_package_gives_it(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    family, names = BY_MODEL_TYPE[model_type], names_of(config.to_dict())
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.architecture)
    oracle = gguf.get_tensor_name_map(key, 2)
    for name in model.state_dict():
        expected = oracle.get_name(name, (".weight", ".bias"))
        if name == "lm_head.weight" and family.is_tied:
            assert names.to_gguf(name) is None
            continue
        assert expected is not None and names.to_gguf(name) == expected, name
        assert names.to_hf(expected) == name
    assert names.to_hf("rope_freqs.weight") is None and names.to_gguf("model.layers.0.other.weight") is None


def test_the_text_part_of_a_larger_model_keeps_its_own_names() -> None:
    config = {"model_type": "llama", **SMALL}
    inner = names_of(config, decoder="model.language_model")
    assert inner.to_hf("blk.1.attn_q.weight") == "model.language_model.layers.1.self_attn.q_proj.weight"
    assert inner.to_gguf("model.language_model.norm.weight") == "output_norm.weight"
    assert inner.to_gguf("model.vision_tower.layers.1.self_attn.q_proj.weight") is None
    nested = names_of(config, decoder="language_model.model", head="language_model.lm_head")
    assert nested.to_hf("output.weight") == "language_model.lm_head.weight"
    assert nested.to_gguf("language_model.lm_head.weight") == "output.weight"


@pytest.mark.parametrize(("module", "heads"), [("q_proj.weight", 4), ("k_proj.bias", 2)])
def test_rows_of_llama_are_interleaved_and_come_back(module: str, heads: int) -> None:
    target = f"model.layers.1.self_attn.{module}"
    rows = np.arange(heads * 8 * 3).reshape(heads * 8, 3)
    rule = names_of({"model_type": "llama", **SMALL}).rule(target, rows.shape)
    assert rule is not None
    # As llama.cpp's LlamaModel.permute does it.
    expected = rows.reshape(heads, 2, 4, 3).swapaxes(1, 2).reshape(rows.shape)
    (found,) = rule.split(rows)
    assert np.array_equal(found, expected) and np.array_equal(rule.join([found]), rows)
    other = names_of({"model_type": "qwen2", **SMALL}).rule(target, rows.shape)
    assert other is not None and other.change.rows is None


def test_only_norms_of_gemma_are_offset() -> None:
    def offset(model_type: str, name: str) -> float:
        rule = names_of({"model_type": model_type, **SMALL}).rule(name, (32,))
        assert rule is not None
        return rule.change.offset

    assert offset("gemma", "model.layers.0.input_layernorm.weight") == offset("gemma", "model.norm.weight") == 1.0
    assert offset("gemma", "model.layers.0.self_attn.q_proj.weight") == 0.0
    assert offset("llama", "model.norm.weight") == 0.0


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(GgufError, match="'rwkv7' are not supported"):
        family_of_metadata({"general.architecture": "rwkv7"})
    unknown: dict[str, Any] = {"general.architecture": ["llama"]}
    with pytest.raises(GgufError, match="are not supported"):
        family_of_metadata(unknown)


def test_negative_zero_keeps_its_sign() -> None:
    rule = names_of({"model_type": "llama", **SMALL}).rule("model.layers.0.mlp.down_proj.weight", (1, 2))
    assert rule is not None
    (found,) = rule.values_in_file(np.array([[-0.0, 0.0]], dtype=np.float32))
    assert np.signbit(found).tolist() == [[True, False]]
