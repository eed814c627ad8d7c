"""Damaged and contradictory files of a model give an error that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from ingle import models
from ingle.config import ModelConfig
from ingle.errors import ModelError
from ingle.models.boundary import reading, refuse_absurd
from ingle.models.loading.meta_device import build


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder: Path) -> None:
    config = ModelConfig(id=str(folder), dtype="float32")
    models.generate(models.load_model(config), models.load_tokenizer(config), [[4, 5]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1,000,000,000,000"),
        ({"vocab_size": 10**400}, "a number of 401 digits"),
        ({"vocab_size": 2**31 - 1}, "too large"),
        ({"intermediate_size": 64}, "does not have the shape that config.json describes"),
        ({"hidden_size": -1}, "hidden_size|hidden size"),
        ({"num_attention_heads": 0}, "ZeroDivision|num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "gelly"}, "hidden_act: KeyError: 'gelly'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "rope_type: KeyError: 'spiral'",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "factor"),
        ({"model_type": 5}, "does not support the architecture"),
        ({"quantization_config": [1]}, "config.json"),
        ({"pad_token_id": 4_000}, "Padding_idx"),
        ({"eos_token_id": 4_000}, "4000; the model has tokens from 0 to 31"),
        ({"eos_token_id": "stop"}, "eos_token_id"),
    ],
    ids=str,
)
def test_an_invalid_config_is_refused_with_its_key(copied: Path, changes: dict[str, Any], named: str) -> None:
    change(copied / "config.json", **changes)
    with pytest.raises(ModelError, match=named) as error:
        load(copied)
    assert "config.json" in str(error.value) or "_config.json" in str(error.value)
    assert "tokenizer of" not in error.value.message and error.value.fix


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"vocab_size": ' + b"9" * 10_000 + b"}"),
        ("generation_config.json", b"[]"),
        ("generation_config.json", b'{"eos_token_id": -5}'),
        ("generation_config.json", b'{"eos_token_id": [1.5]}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["a", "b"]]}}'),
        ("tokenizer_config.json", b"3"),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": 5}'),
        ("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 7}'),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 5, "b": "x"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../config.json"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "none.safetensors"}}'),
    ],
    ids=lambda value: value[:40].decode("latin1") if isinstance(value, bytes) else value,
)
def test_a_damaged_file_is_named(copied: Path, name: str, content: bytes) -> None:
    (copied / name).write_bytes(content)
    with pytest.raises(ModelError) as error:
        load(copied)
    folder_named = name.startswith("tokenizer") and str(copied) in str(error.value)
    assert name in str(error.value) or folder_named or "none.safetensors" in error.value.message, str(error.value)


def test_ctrl_c_passes_but_a_panic_in_rust_becomes_an_error() -> None:
    class PanicException(BaseException):
        """The same name as pyo3's."""

    with pytest.raises(KeyboardInterrupt), reading("a", "It cannot be read.", fix="read it again"):
        raise KeyboardInterrupt
    with pytest.raises(ModelError, match="index out of range"), reading("a", "It cannot be read.", fix="read it again"):
        raise PanicException("index out of range")


def test_sizes_of_real_models_are_accepted(tmp_path: Path) -> None:
    large = {"num_hidden_layers": 126, "n_routed_experts": 384, "vocab_size": 262_144, "num_params": 10**12}
    refuse_absurd({**large, "rope_theta": 10**11, "rope_parameters": {"rope_theta": 5e8}}, tmp_path)


def test_a_token_without_an_embedding_is_refused(model: hf.PreTrainedModel, tokenizer: Any) -> None:
    tokenizer.add_tokens(["more"])
    models.generate(model, tokenizer, [[4]], max_new_tokens=1)  # a larger tokenizer does no harm by itself
    with pytest.raises(ModelError, match="'more', for which the model has no embedding"):
        models.generate(model, tokenizer, [[4, len(tokenizer) - 1]], max_new_tokens=1)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=20), 20),
        (hf.OPTConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16,
                      word_embed_proj_dim=16, max_position_embeddings=20), 20),
        (hf.GPTNeoConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=20,
                         attention_types=[[["local"], 1]], window_size=4), 20),
        (hf.GPTJConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=20, rotary_dim=4), 20),
        (hf.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, max_position_embeddings=20), None),
    ],
    ids=lambda value: value.model_type if isinstance(value, hf.PretrainedConfig) else "",
)  # fmt: skip
def test_texts_longer_than_the_position_table_are_refused(config, longest: int | None) -> None:
    model = build(config, torch.float32)
    models.refuse_longer(model, 20, where="data.max_seq_len")
    if longest is None:
        models.refuse_longer(model, 10**6, where="data.max_seq_len")
        return
    with pytest.raises(ModelError, match="only 20 positions") as error:
        models.refuse_longer(model, 21, where="data.max_seq_len")
    assert error.value.fix == "--data.max_seq_len=20"
