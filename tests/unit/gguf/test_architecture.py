"""Tests the conversion of configs to GGUF metadata and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ingle.errors import GgufError
from ingle.gguf import GgufFile, TensorToWrite, read_gguf, write_gguf
from ingle.gguf.architecture import to_config, to_metadata
from ingle.gguf.families import _REASONS, FAMILIES, family_of_metadata, supports, why_unsupported
from ingle.gguf.rotary import rope_divisors

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def through_a_file(config: Any, path: Path, *, tied: bool = True) -> GgufFile:
    """A file with the tensors that a config is read from."""
    raw = config.to_dict()
    tensors = [TensorToWrite("token_embd.weight", "f32", (config.vocab_size, 2), lambda: np.zeros((50, 2), "f4"))]
    if not tied:
        tensors.append(TensorToWrite("output.weight", "f32", (config.vocab_size, 2), lambda: np.zeros((50, 2), "f4")))
    divisors = rope_divisors(raw)
    if divisors is not None:
        tensors.append(TensorToWrite("rope_freqs.weight", "f32", divisors.shape, lambda: divisors))
    write_gguf(path / "x.gguf", to_metadata(raw), tensors)
    return read_gguf(path / "x.gguf")


CASES = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 8}),
    (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
    ),
    ("gemma", {}),
    ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    ("gemma3_text", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
]


@pytest.mark.parametrize(("model_type", "changes"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_the_same_after_the_way_there_and_back(
    model_type: str, changes: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes}, tie_word_embeddings=tied)
    if model_type in ("gemma", "gemma2") and not tied:
        with pytest.raises(GgufError, match="uses the embedding as the output head"):
            to_metadata(config.to_dict())
        return
    read = to_config(through_a_file(config, tmp_path, tied=tied))
    again = AutoConfig.for_model(read.pop("model_type"), **read)
    torch.manual_seed(0)
    with torch.no_grad():
        first = AutoModelForCausalLM.from_config(config).eval()
        second = AutoModelForCausalLM.from_config(again).eval()
        for parameter in first.parameters():
            parameter.normal_(std=0.2)
        second.load_state_dict(first.state_dict())
        tokens = torch.randint(50, (2, 40))
        assert torch.equal(first(tokens).logits, second(tokens).logits)
    assert again.tie_word_embeddings == tied
    assert again.rope_parameters == config.rope_parameters


def test_the_divisors_are_those_of_transformers() -> None:
    config = AutoConfig.for_model("llama", **{**SMALL, "head_dim": 64, "rope_parameters": LLAMA3})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    divisors = rope_divisors(config.to_dict())
    assert divisors is not None and divisors.max() == 32 and divisors.min() == 1
    np.testing.assert_allclose(plain / divisors, scaled.numpy(), rtol=1e-5)


def test_every_architecture_of_the_gguf_package_is_supported_or_refused_with_a_reason() -> None:
    supported = {family.architecture for family in FAMILIES}
    assert supported <= set(gguf.MODEL_ARCH_NAMES.values()) and set(_REASONS) <= set(gguf.MODEL_ARCH_NAMES.values())
    for architecture in set(gguf.MODEL_ARCH_NAMES.values()) - supported:
        with pytest.raises(GgufError) as info:
            family_of_metadata({"general.architecture": architecture})
        assert f"llama.cpp has the architecture {architecture}," in str(info.value) or architecture in _REASONS
    assert not supported & set(_REASONS)
    assert supports("gemma3_text") and supports("t5") and not supports("rwkv")
    assert "no decoder" in why_unsupported("t5encoder") and "no architecture of this name" in why_unsupported("opt")


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    def config(model_type: str, **changes: Any) -> dict[str, Any]:
        return AutoConfig.for_model(model_type, **{**SMALL, **changes}).to_dict()

    with pytest.raises(GgufError, match="'opt' are not supported"):
        to_metadata({"model_type": "opt"})
    with pytest.raises(GgufError, match="scales attention by 16"):
        to_metadata(config("gemma2", query_pre_attn_scalar=99))
    with pytest.raises(GgufError, match="every 2th layer"):
        to_metadata(config("gemma2", query_pre_attn_scalar=16, layer_types=["full_attention"] * 3))
    with pytest.raises(GgufError, match="sliding windows"):
        to_metadata(config("qwen2", use_sliding_window=True))
    with pytest.raises(GgufError, match="'dynamic' cannot be written"):
        to_metadata(config("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    with pytest.raises(GgufError, match="cannot load heads of this size"):
        to_metadata(config("nemotron", head_dim=2 * SMALL["hidden_size"]))
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(GgufError, match="its smallest context is 256"):
        to_metadata(config("phi3", original_max_position_embeddings=255, rope_parameters=longrope))
    # Beyond the window llama.cpp would see more than transformers does.
    assert to_metadata(config("mistral", sliding_window=512))["llama.context_length"] == 512


def test_what_a_file_asks_for_and_is_not_there_is_refused(tmp_path: Path) -> None:
    metadata = to_metadata(AutoConfig.for_model("llama", **SMALL).to_dict())

    def message(changes: dict[str, Any], tensors: list[TensorToWrite] | None = None) -> str:
        write_gguf(tmp_path / "x.gguf", {k: v for k, v in (metadata | changes).items() if v is not None}, tensors or [])
        with pytest.raises(GgufError) as info:
            to_config(read_gguf(tmp_path / "x.gguf"))
        return str(info.value)

    assert "llama.block_count is missing" in message({"llama.block_count": None})
    assert "llama.feed_forward_length is [1, 2]" in message({"llama.feed_forward_length": [1, 2]})
    assert "llama.expert_used_count is missing" in message({"llama.expert_count": 8})
    assert "a part of each head" in message({"llama.rope.dimension_count": 8})
    assert "'longrope'" in message({"llama.rope.scaling.type": "longrope"})
    odd = TensorToWrite("rope_freqs.weight", "f32", (8,), lambda: np.linspace(1, 7, 8, dtype="f4"))
    assert "not that of Llama 3" in message({}, [odd])
