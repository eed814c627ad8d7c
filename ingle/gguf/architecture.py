"""Converts the shape of a model between transformers' ``config.json`` and GGUF metadata, without transformers.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and ``src/models/*.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import DAMAGED, ArchitectureValues, GgufFile
from ingle.gguf.names import ALWAYS_TIED, names_of, unsupported
from ingle.gguf.rotary import head_size, read_rotary, rotary_parameters, scaling_metadata
from ingle.gguf.vocabulary import special_token_id

#: transformers' ``model_type`` to llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
#: llama.cpp's architecture to the equivalent ``model_type`` and class of transformers.
_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
#: Every how many layers there is one with full attention.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
#: Number of layers of the models that scale attention by hidden / heads.
_LARGEST = {"gemma2": 46, "gemma3": 62}
_LAYER = re.compile(r"^blk\.(\d{1,9})\.")


def to_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the GGUF metadata of a model, starting with ``general.architecture``.

    Args:
        config: The content of ``config.json``, or ``config.to_dict()``.

    Raises:
        GgufError: llama.cpp or this converter does not support the architecture or a detail of it.
    """
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise unsupported(config["model_type"])
    if architecture in ALWAYS_TIED and not config.get("tie_word_embeddings", True):
        raise GgufError(
            "llama.cpp always uses the embedding as the output head of this architecture.", where="tie_word_embeddings"
        )
    head_dim = head_size(config)
    rope = rotary_parameters(config)
    full_rope = rope.get("full_attention", rope)
    values: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": _context(config),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        "rope.freq_base": float(full_rope.get("rope_theta", 10000.0)),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
    }
    if architecture == "llama":
        values["rope.dimension_count"] = head_dim
    values |= scaling_metadata(full_rope)
    values |= _gemma_metadata(architecture, config, rope)
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in values.items()}


def to_config(file: GgufFile) -> dict[str, Any]:
    """Returns the content of a ``config.json`` for a model that computes the same as llama.cpp does with the file.

    Raises:
        GgufError: The architecture or a detail of it is not supported, or metadata is missing.
    """
    names = names_of(file.metadata)
    architecture = names.architecture
    values = ArchitectureValues(file, architecture)
    num_heads, hidden = names.num_heads, values.integer("embedding_length")
    head_dim = values.integer("attention.key_length", hidden // num_heads)
    for is_unsupported, feature in (
        (head_dim % 2, f"Rotary embeddings of heads with {head_dim} features"),
        (values.integer("attention.value_length", head_dim) != head_dim, "Keys and values of different length"),
        (values.integer("rope.dimension_count", head_dim) != head_dim, "Rotary embeddings of a part of each head"),
        (values.integer("expert_count", 0, low=0), "GGUF models with experts"),
    ):
        if is_unsupported:
            raise GgufError(f"{feature} are not supported.", where=str(file.path))
    model_type, class_name = _CLASSES[architecture]
    num_layers = values.integer("block_count")
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": names.num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": values.integer("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0] if embedding is not None and embedding.shape else 0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": read_rotary(file, values, head_dim),
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if architecture == "qwen3":
        config["attention_bias"] = False
    if architecture in _FULL_EVERY:
        config |= _read_gemma(values, architecture, num_layers, hidden // num_heads, head_dim)
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
    num_layers = len({match[1] for name in file.tensors if (match := _LAYER.match(name))})
    if num_layers != config["num_hidden_layers"]:
        raise _mismatch(file, f"{config['num_hidden_layers']} layers", f"tensors of {num_layers} layers")
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    expected = {
        "token_embd": (len(tokens) if isinstance(tokens, list) and tokens else config["vocab_size"], hidden),
        "blk.0.attn_q": (config["num_attention_heads"] * head_dim, hidden),
        "blk.0.attn_k": (config["num_key_value_heads"] * head_dim, hidden),
        "blk.0.ffn_up": (config["intermediate_size"], hidden),
    }
    for name, shape in expected.items():
        tensor = file.tensors.get(f"{name}.weight")
        if tensor is None or tensor.shape != shape:
            found = "no such tensor" if tensor is None else f"shape {list(tensor.shape)}"
            raise _mismatch(file, f"{name}.weight of shape {list(shape)}", found)


def _mismatch(file: GgufFile, expected: str, found: str) -> GgufError:
    return GgufError(
        f"The metadata and the tensors of {file.path.name} describe different models.",
        where=str(file.path),
        why=f"expected from the metadata: {expected}; found: {found}",
        fix=DAMAGED,
    )


def _context(config: Mapping[str, Any]) -> int:
    """Returns the longest text that llama.cpp computes as transformers does: it ignores Mistral's sliding window."""
    longest = int(config["max_position_embeddings"])
    return min(longest, config.get("sliding_window") or longest) if config["model_type"] == "mistral" else longest


def _gemma_metadata(architecture: str, config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sliding windows and soft caps of Gemma 2 and 3."""
    if architecture not in _FULL_EVERY:
        if config.get("use_sliding_window"):
            raise GgufError("llama.cpp does not support sliding windows for this architecture.", where="sliding_window")
        return {}
    num_layers = config["num_hidden_layers"]
    if config.get("layer_types") not in (None, _layer_types(architecture, num_layers)):
        raise GgufError(
            f"llama.cpp requires full attention in every {_FULL_EVERY[architecture]}th layer.", where="layer_types"
        )
    scalar = _query_scalar(
        architecture, num_layers, config["hidden_size"] // config["num_attention_heads"], int(config["head_dim"])
    )
    if config.get("query_pre_attn_scalar", scalar) != scalar:
        raise GgufError(
            f"llama.cpp scales attention by {scalar} in a model of this size.", where="query_pre_attn_scalar"
        )
    values: dict[str, Any] = {"attention.sliding_window": config["sliding_window"]}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := config.get(key)) is not None:
            values[key] = float(cap)
    if "sliding_attention" in rope:
        values["rope.freq_base_swa"] = float(rope["sliding_attention"].get("rope_theta", 10000.0))
    return values


def _layer_types(architecture: str, num_layers: int) -> list[str]:
    every = _FULL_EVERY[architecture]
    return ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(num_layers)]


def _query_scalar(architecture: str, num_layers: int, hidden_per_head: int, head_dim: int) -> int:
    """Returns the square of the divisor of attention scores, which llama.cpp derives from the number of layers."""
    return hidden_per_head if num_layers == _LARGEST[architecture] else head_dim


def _read_gemma(
    values: ArchitectureValues, architecture: str, num_layers: int, hidden_per_head: int, head_dim: int
) -> dict[str, Any]:
    is_gemma2 = architecture == "gemma2"  # has defaults in llama.cpp
    return {
        "layer_types": _layer_types(architecture, num_layers),
        "sliding_window": values.integer("attention.sliding_window", 4096 if is_gemma2 else None),
        "query_pre_attn_scalar": _query_scalar(architecture, num_layers, hidden_per_head, head_dim),
        "attn_logit_softcapping": values.number("attn_logit_softcapping", 50.0) if is_gemma2 else None,
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0 if is_gemma2 else 0.0, zero=True)
        or None,
    }
