"""The shape of a model: transformers' ``config.json`` to GGUF metadata and back, without transformers.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and ``src/models/*.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import GgufFile
from ingle.gguf.names import ALWAYS_TIED, names_of, unsupported
from ingle.gguf.rotary import head_size, read_rotary, rotary_parameters, scaling_metadata
from ingle.gguf.values import ArchitectureValues
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

#: llama.cpp's architecture to the class of transformers that computes the same.
_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

#: Every how many layers one attends to everything, and the layers of the sizes that scale attention by hidden / heads.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
_LARGEST = {"gemma2": 46, "gemma3": 62}


def to_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF metadata that describe a model, beginning with ``general.architecture``.

    Args:
        config: The content of ``config.json``, or ``config.to_dict()``.

    Raises:
        GgufError: When llama.cpp, or this converter, does not know the architecture or a detail of it.
    """
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise unsupported(config["model_type"])
    if architecture in ALWAYS_TIED and not config.get("tie_word_embeddings", True):
        raise GgufError("llama.cpp takes the embedding as the head of this architecture.", where="tie_word_embeddings")
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
    values |= _windows(architecture, config, rope)
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in values.items()}


def to_config(file: GgufFile) -> dict[str, Any]:
    """The content of a ``config.json`` that computes what llama.cpp computes with the file.

    Raises:
        GgufError: When the architecture or a detail of it is not supported, or metadata are missing.
    """
    names = names_of(file.metadata)
    architecture = names.architecture
    values = ArchitectureValues(file, architecture)
    num_heads, hidden = names.num_heads, values.whole("embedding_length")
    head_dim = values.whole("attention.key_length", hidden // num_heads)
    if head_dim % 2:
        raise GgufError(f"Heads of {head_dim} features cannot be rotated in pairs.", where=str(file.path))
    if values.whole("attention.value_length", head_dim) != head_dim:
        raise GgufError("Keys and values of different length are not supported.", where=str(file.path))
    if values.whole("rope.dimension_count", head_dim) != head_dim:
        raise GgufError("Rotating a part of each head is not supported.", where=str(file.path))
    if values.whole("expert_count", 0, low=0):
        raise GgufError("GGUF models with experts are not supported yet.", where=str(file.path))
    model_type, class_name = _CLASSES[architecture]
    num_layers = values.whole("block_count")
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": values.whole("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": names.num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": values.whole("context_length"),
        "rms_norm_eps": values.positive("attention.layer_norm_rms_epsilon"),
        "vocab_size": _num_rows(file, "token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": read_rotary(file, values, head_dim),
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if architecture == "qwen3":
        config["attention_bias"] = False
    if architecture in _FULL_EVERY:
        config |= _read_gemma(values, architecture, num_layers, hidden, num_heads, head_dim)
    for key in ("bos", "eos", "pad"):
        full = "padding" if key == "pad" else key
        if (number := special_token_id(file.metadata, full)) is not None:
            config[f"{key}_token_id"] = number
    return config


def _num_rows(file: GgufFile, name: str) -> int:
    """Rows of a matrix; 0 when there is no such matrix."""
    tensor = file.tensors.get(name)
    return tensor.shape[0] if tensor is not None and tensor.shape else 0


def _context(config: Mapping[str, Any]) -> int:
    """The longest text that llama.cpp computes as transformers does: it does not know Mistral's sliding window."""
    longest = int(config["max_position_embeddings"])
    return min(longest, config.get("sliding_window") or longest) if config["model_type"] == "mistral" else longest


def _windows(architecture: str, config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """What only the later Gemmas have: local layers and soft caps."""
    if architecture not in _FULL_EVERY:
        if config.get("use_sliding_window"):
            raise GgufError("llama.cpp does not know sliding windows for this architecture.", where="sliding_window")
        return {}
    expected = _layer_types(architecture, config["num_hidden_layers"])
    if config.get("layer_types") not in (None, expected):
        raise GgufError(f"llama.cpp expects every {_FULL_EVERY[architecture]}th layer to attend to everything.")
    scalar = _query_scalar(
        architecture, config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"], config
    )
    if config.get("query_pre_attn_scalar", scalar) != scalar:
        raise GgufError(
            f"llama.cpp scales attention by {scalar} in a model of this size.", where="query_pre_attn_scalar"
        )
    values: dict[str, Any] = {"attention.sliding_window": config["sliding_window"]}
    if (cap := config.get("attn_logit_softcapping")) is not None:
        values["attn_logit_softcapping"] = float(cap)
    if (cap := config.get("final_logit_softcapping")) is not None:
        values["final_logit_softcapping"] = float(cap)
    if "sliding_attention" in rope:
        values["rope.freq_base_swa"] = float(rope["sliding_attention"].get("rope_theta", 10000.0))
    return values


def _layer_types(architecture: str, num_layers: int) -> list[str]:
    every = _FULL_EVERY[architecture]
    return ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(num_layers)]


def _query_scalar(architecture: str, num_layers: int, hidden: int, num_heads: int, config: Mapping[str, Any]) -> int:
    """The square of what attention is divided by, as llama.cpp derives it from the number of layers."""
    return hidden // num_heads if num_layers == _LARGEST[architecture] else int(config["head_dim"])


def _read_gemma(
    values: ArchitectureValues, architecture: str, num_layers: int, hidden: int, num_heads: int, head_dim: int
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "layer_types": _layer_types(architecture, num_layers),
        "sliding_window": values.whole("attention.sliding_window", 4096 if architecture == "gemma2" else None),
        "query_pre_attn_scalar": _query_scalar(architecture, num_layers, hidden, num_heads, {"head_dim": head_dim}),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if architecture == "gemma2":  # llama.cpp's own defaults
        config["attn_logit_softcapping"] = values.positive("attn_logit_softcapping", 50.0)
    cap = values.number("final_logit_softcapping", 30.0 if architecture == "gemma2" else 0.0)
    config["final_logit_softcapping"] = cap or None
    return config
