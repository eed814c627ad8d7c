"""Tests GGUF files whose metadata and tensors, or parts of the tokenizer, contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingle.errors import GgufError
from ingle.gguf import GgufFile, TensorToWrite, read_gguf, write_gguf
from ingle.gguf.architecture import require_sizes, to_config
from ingle.gguf.vocabulary import to_vocabulary

#: A model of two layers, H 8, two heads of 4, one of keys and values, F 12, five tokens.
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.key_length": 4,
    "llama.attention.value_length": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "c", "<eos>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 4,
}
SHAPES = {"token_embd": (5, 8), "output_norm": (8,)} | {
    f"blk.{layer}.{part}": shape
    for layer in range(2)
    for part, shape in {"attn_q": (8, 8), "attn_k": (4, 8), "ffn_up": (12, 8), "ffn_down": (8, 12)}.items()
}


def written(path: Path, changes: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> GgufFile:
    tensors = [
        TensorToWrite(f"{name}.weight", "f32", shape, lambda shape=shape: np.zeros(shape, np.float32))
        for name, shape in shapes.items()
    ]
    write_gguf(path, {key: value for key, value in (METADATA | changes).items() if value is not None}, tensors)
    return read_gguf(path)


def read(file: GgufFile) -> None:
    require_sizes(file, to_config(file))
    to_vocabulary(file.metadata)


def test_a_whole_file_is_taken(tmp_path: Path) -> None:
    read(written(tmp_path / "x.gguf", {}, SHAPES))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 2**31 - 1),
        ("llama.block_count", 1),
        ("llama.block_count", [2, 2]),
        ("llama.embedding_length", 16),
        ("llama.feed_forward_length", 2**31 - 1),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", 3),
        ("llama.context_length", -1),
        ("llama.rope.freq_base", 0.0),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("tokenizer.ggml.tokens", ["a"]),
        ("tokenizer.ggml.tokens", [1, 2, 3, 4, 5]),
        ("tokenizer.ggml.token_type", [1, 1]),
        ("tokenizer.ggml.merges", "a b"),
        ("tokenizer.ggml.pre", [1]),
        ("tokenizer.ggml.eos_token_id", 5),
        ("tokenizer.ggml.eos_token_id", -1),
        ("tokenizer.chat_template", 1),
    ],
)
def test_what_contradicts_the_rest_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(GgufError) as info:
        read(written(tmp_path / "x.gguf", {key: value}, SHAPES))
    assert info.value.where


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"blk.0.attn_q": (8, 8)},
        {name: shape for name, shape in SHAPES.items() if not name.startswith("blk.1.")},
        SHAPES | {"token_embd": (8, 5)},
        SHAPES | {"blk.0.ffn_up": (24, 8)},
    ],
    ids=["no tensors", "one tensor", "one layer", "turned", "wider"],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(GgufError, match=r"contains no model|describe different models"):
        read(written(tmp_path / "x.gguf", {}, shapes))


def test_a_token_that_takes_too_long_to_cut_is_refused() -> None:
    with pytest.raises(GgufError, match="characters"):
        to_vocabulary(METADATA | {"tokenizer.ggml.tokens": ["a" * 100_000, "b", "ab", "c", "<eos>"]})
