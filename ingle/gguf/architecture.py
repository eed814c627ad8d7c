"""Converts the shape of a model between transformers' ``config.json`` and GGUF metadata, without transformers.

What is special in an architecture is in its record in :mod:`ingle.gguf.families`.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and ``src/models/*.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import DAMAGED, ArchitectureValues, GgufFile
from ingle.gguf.families import BY_MODEL_TYPE, family_of_config, family_of_metadata
from ingle.gguf.rotary import head_size
from ingle.gguf.special_tokens import special_token_id

#: transformers' ``model_type`` to llama.cpp's architecture.
ARCHITECTURES = {model_type: family.architecture for model_type, family in BY_MODEL_TYPE.items()}
#: Architectures whose attention llama.cpp loads only if all heads together are as wide as the hidden state.
_WHOLE_HEADS = frozenset(
    (
        *("cohere2", "command-r", "exaone4", "lfm2", "lfm2moe", "nemotron", "olmo", "olmo2", "olmoe", "phi2", "phi3"),
        *("qwen2", "qwen2moe", "qwen2vl", "stablelm", "starcoder2"),
    )
)
_LAYER = re.compile(r"^((?:enc\.|dec\.)?blk)\.(\d{1,9})\.(.+)\.weight$")


def to_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the GGUF metadata of a model, starting with ``general.architecture``.

    Args:
        config: The content of ``config.json``, or ``config.to_dict()``.

    Raises:
        GgufError: llama.cpp or this converter does not support the architecture or a detail of it.
    """
    family = family_of_config(config)
    if family.is_tied and not config.get("tie_word_embeddings", True):
        raise GgufError(
            "llama.cpp always uses the embedding as the output head of this architecture.", where="tie_word_embeddings"
        )
    if family.is_tied is None and config.get("tie_word_embeddings", False):
        raise GgufError(
            "llama.cpp requires an output head of its own for this architecture.",
            where="tie_word_embeddings",
            why="the embedding is the output head of this model",
            fix="--to safetensors",
        )
    values = {f"{family.architecture}.{key}": value for key, value in family.write_metadata(config).items()}
    if family.architecture in _WHOLE_HEADS:
        _require_whole_heads(config)
    return {"general.architecture": family.architecture} | values


def _require_whole_heads(config: Mapping[str, Any]) -> None:
    heads, width, hidden = config["num_attention_heads"], head_size(config), config["hidden_size"]
    if heads * width != hidden:
        raise GgufError(
            "llama.cpp cannot load heads of this size in this architecture.",
            where="head_dim",
            why=f"{heads} heads of {width} are {heads * width} wide, and hidden_size is {hidden}",
            fix="--to safetensors",
        )


def to_config(file: GgufFile) -> dict[str, Any]:
    """Returns the content of a ``config.json`` for a model that computes the same as llama.cpp does with the file.

    Raises:
        GgufError: The architecture or a detail of it is not supported, or metadata is missing.
    """
    family = family_of_metadata(file.metadata)
    if file.metadata.get(f"{family.architecture}.expert_count") and not family.has_experts:
        raise GgufError(
            f"Experts in a model of architecture {family.architecture} are not supported.", where=str(file.path)
        )
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0] if embedding is not None and embedding.shape else 0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config |= family.read_config(file, ArchitectureValues(file, family.architecture))
    for key in ("bos", "eos", "pad"):
        if (number := special_token_id(file.metadata, "padding" if key == "pad" else key)) is not None:
            config[f"{key}_token_id"] = number
    return config


def require_sizes(file: GgufFile, config: Mapping[str, Any]) -> None:
    """Checks that the tensors of a file have the sizes of its metadata.

    A model is built from metadata alone. Wrong sizes are rejected before that, because a model of two billion layers
    would fill all memory before the first missing weight is noticed.

    Args:
        file: The file.
        config: The result of :func:`to_config`.

    Raises:
        GgufError: The file contains no weights, or weights of other sizes.
    """
    if "token_embd.weight" not in file.tensors:
        raise GgufError(
            f"{file.path.name} contains no model.",
            where=str(file.path),
            why=f"token_embd.weight is not among its {len(file.tensors)} tensors",
            fix="choose a file with all weights, not with the vocabulary or a part of the model",
        )
    family = family_of_metadata(file.metadata)
    matches = [match for name in file.tensors if (match := _LAYER.match(name))]
    num_layers = len({match.group(1, 2) for match in matches})
    values = ArchitectureValues(file, family.architecture)
    expected_layers = values.integer("block_count")
    if config.get("is_encoder_decoder"):
        expected_layers += values.integer("decoder_block_count", expected_layers)
    if num_layers != expected_layers:
        raise _mismatch(file, f"{expected_layers} layers", f"tensors of {num_layers} layers")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) and tokens else config["vocab_size"]
    first: dict[str, str] = {}
    for match in matches:
        first.setdefault(match[3], match[0])
    width = config.get("hidden_size") or config.get("d_model") or config["n_embd"]
    expected: dict[str, tuple[int, ...]] = {"token_embd.weight": (num_tokens, width)}
    for part, shape in family.sizes(config).items():
        expected[first.get(part, f"blk.0.{part}.weight")] = shape
    for name, shape in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None or tensor.shape != shape:
            found = "no such tensor" if tensor is None else f"shape {list(tensor.shape)}"
            raise _mismatch(file, f"{name} of shape {list(shape)}", found)


def _mismatch(file: GgufFile, expected: str, found: str) -> GgufError:
    return GgufError(
        f"The metadata and the tensors of {file.path.name} describe different models.",
        where=str(file.path),
        why=f"expected from the metadata: {expected}; found: {found}",
        fix=DAMAGED,
    )
