"""Compares tensor names with the ``gguf`` package and the order of rows with llama.cpp's formula."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ingle.errors import GgufError
from ingle.gguf.architecture import ARCHITECTURES
from ingle.gguf.names import ALWAYS_TIED, TensorNames, names_of

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


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_weight_has_the_name_that_the_package_gives_it(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **SMALL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = ARCHITECTURES[model_type]
    names = TensorNames(architecture, 4, 2)
    key = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    oracle = gguf.get_tensor_name_map(key, 2)
    for name in model.state_dict():
        expected = oracle.get_name(name, (".weight", ".bias"))
        if name == "lm_head.weight" and architecture in ALWAYS_TIED:
            assert names.to_gguf(name) is None
            continue
        assert expected is not None and names.to_gguf(name) == expected, name
        assert names.to_hf(expected) == name
    assert names.to_hf("rope_freqs.weight") is None and names.to_gguf("model.layers.0.other.weight") is None


@pytest.mark.parametrize(("name", "heads"), [("blk.1.attn_q.weight", 4), ("blk.0.attn_k.bias", 2)])
def test_rows_of_llama_are_interleaved_and_come_back(name: str, heads: int) -> None:
    names = TensorNames("llama", 4, 2)
    rows = np.arange(heads * 8 * 3).reshape(heads * 8, 3)
    order = names.permutation(name, len(rows))
    assert order is not None
    # As llama.cpp's LlamaModel.permute does it.
    expected = rows.reshape(heads, 2, 4, 3).swapaxes(1, 2).reshape(rows.shape)
    assert np.array_equal(rows[order], expected)
    assert np.array_equal(rows[order][np.argsort(order)], rows)
    assert TensorNames("qwen2", 4, 2).permutation(name, 32) is None
    assert names.permutation("blk.0.attn_v.weight", 16) is None


def test_only_norms_of_gemma_are_offset() -> None:
    assert TensorNames("gemma", 1, 1).offset("blk.0.attn_norm.weight") == 1.0
    assert TensorNames("gemma", 1, 1).offset("blk.0.attn_q.weight") == 0.0
    assert TensorNames("llama", 1, 1).offset("output_norm.weight") == 0.0


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(GgufError, match="'mamba' are not supported"):
        names_of({"general.architecture": "mamba"})
    with pytest.raises(GgufError, match="numbers of attention heads"):
        names_of({"general.architecture": "llama", "llama.attention.head_count": [4, 8]})
