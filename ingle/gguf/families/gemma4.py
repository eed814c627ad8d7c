"""Gemma 4: heads of two sizes, a small embedding for each layer, and layers that share keys and values.

Full attention rotates a part of each head: a file has divisors of its frequencies, 1 for the rotated pairs and a number
for the others that is so large that they keep still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import ATTENTION, FEED_FORWARD, HEAD_NORMS
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.families.gemma import FOUR_NORMS
from ingle.gguf.rotary import ROPE_FREQS, STILL, head_size

_FULL = "full_attention"


def _full_size(config: Config, key: str) -> int:
    """Returns a setting of the layers with full attention."""
    layers = config.get("per_layer_config") or {}
    first = list(config["layer_types"]).index(_FULL)
    own = layers.get(first) or layers.get(str(first)) or {}
    return int(own.get(key) or (head_size(config) if key == "head_dim" else config[key]))


def _metadata(config: Config) -> dict[str, Any]:
    kinds, shared = list(config["layer_types"]), int(config.get("num_kv_shared_layers") or 0)
    width, wide = config["hidden_size_per_layer_input"], config["intermediate_size"]
    if width and config["vocab_size_per_layer_input"] != config["vocab_size"]:
        raise GgufError(
            "llama.cpp requires embeddings of the layers for every token.", where="vocab_size_per_layer_input"
        )
    first_shared = len(kinds) - shared
    doubled = shared and config.get("use_double_wide_mlp")
    kv_heads, full_kv_heads = config["num_key_value_heads"], _full_size(config, "num_key_value_heads")
    rope, head_dim, full_head_dim = config["rope_parameters"], head_size(config), _full_size(config, "head_dim")
    values = {
        "block_count": len(kinds),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": [wide * (2 if doubled and layer >= first_shared else 1) for layer in range(len(kinds))],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": [full_kv_heads if kind == _FULL else kv_heads for kind in kinds],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": full_head_dim,
        "attention.value_length": full_head_dim,
        "attention.key_length_swa": head_dim,
        "attention.value_length_swa": head_dim,
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": [kind != _FULL for kind in kinds],
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": width,
        "rope.freq_base": float(rope[_FULL]["rope_theta"]),
        "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": full_head_dim,
        "rope.dimension_count_swa": head_dim,
        "vocab_size": config["vocab_size"],
    }
    cap = config.get("final_logit_softcapping")
    return values | ({} if cap is None else {"final_logit_softcapping": float(cap)})


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    num_layers = values.integer("block_count")
    kv_heads, windows, inner = (
        _by_layer(file, values, key, num_layers)
        for key in ("attention.head_count_kv", "attention.sliding_window_pattern", "feed_forward_length")
    )
    full = next((layer for layer in range(num_layers) if not windows[layer]), num_layers - 1)
    local = next((layer for layer in range(num_layers) if windows[layer]), full)
    width = values.integer("embedding_length_per_layer_input", low=0)
    return {
        "hidden_size": values.integer("embedding_length"),
        "intermediate_size": inner[0],
        "num_hidden_layers": num_layers,
        "num_attention_heads": values.integer("attention.head_count"),
        "num_key_value_heads": kv_heads[local],
        "num_global_key_value_heads": None if kv_heads[full] == kv_heads[local] else kv_heads[full],
        "head_dim": values.integer("attention.key_length_swa"),
        "global_head_dim": values.integer("attention.key_length"),
        "max_position_embeddings": values.integer("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "layer_types": ["sliding_attention" if local else _FULL for local in windows],
        "sliding_window": values.integer("attention.sliding_window"),
        "num_kv_shared_layers": values.integer("attention.shared_kv_layers", 0, low=0),
        "use_double_wide_mlp": inner[-1] == 2 * inner[0],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": _num_tokens(file),
        "final_logit_softcapping": values.number("final_logit_softcapping", 0.0, zero=True) or None,
        "rope_parameters": {
            _FULL: {
                "rope_type": "proportional",
                "partial_rotary_factor": _rotated_part(file),
                "rope_theta": values.number("rope.freq_base", 1e6),
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": values.number("rope.freq_base_swa", 10000.0),
            },
        },
    }


def _by_layer(file: GgufFile, values: ArchitectureValues, key: str, num_layers: int) -> list[int]:
    """Returns a value for each layer; a file may have one for all."""
    value: Any = values.get(key)
    found: list[Any] = value if isinstance(value, list) else [value] * min(num_layers, 10_000)
    if len(found) != num_layers or any(not isinstance(each, int) or each < 0 for each in found):
        raise GgufError(
            f"The file does not have {key} for each of {num_layers:,} layers.", where=f"{file.path}, gemma4.{key}"
        )
    return found


def _num_tokens(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding is not None and embedding.shape else 0


def _rotated_part(file: GgufFile) -> float:
    """Returns the part of each head that full attention rotates."""
    tensor = file.tensors.get(ROPE_FREQS)
    if tensor is None:
        return 1.0
    divisors = tensor.read().view(np.float32).reshape(-1) if tensor.type_name == "f32" else np.zeros(1, np.float32)
    rotated = int((divisors == 1).sum())
    if not np.all(divisors[:rotated] == 1) or not np.all(divisors[rotated:] >= STILL / 2):
        raise GgufError(
            "The divisors of the rotary frequencies are not those of Gemma 4.", where=f"{file.path}, {ROPE_FREQS}"
        )
    return rotated / len(divisors)


def _sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    return {"ffn_up": (config["intermediate_size"], config["hidden_size"])}


GEMMA4 = GgufFamily(
    architecture="gemma4",
    model_type="gemma4_text",
    class_name="Gemma4ForCausalLM",
    read_config=_read,
    write_metadata=_metadata,
    layer=ATTENTION
    | FEED_FORWARD
    | FOUR_NORMS
    | HEAD_NORMS
    | {
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
    },
    parameters={"layer_scalar": ("layer_output_scale.weight",)},
    sizes=_sizes,
    top={
        "model.embed_tokens": "token_embd",
        "model.embed_tokens_per_layer": "per_layer_token_embd",
        "model.per_layer_model_projection": "per_layer_model_proj",
        "model.per_layer_projection_norm": "per_layer_proj_norm",
        "model.norm": "output_norm",
        "lm_head": "output",
    },
)


def _read_experts(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return _read(file, values) | {
        "enable_moe_block": True,
        "num_experts": values.integer("expert_count"),
        "top_k_experts": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
    }


def _num_experts(config: Config) -> int:
    return int(config.get("num_experts") or config["num_local_experts"])


def _expert_metadata(config: Config) -> dict[str, Any]:
    return _metadata(config) | {
        "expert_count": _num_experts(config),
        "expert_used_count": config["top_k_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def _expert_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    stack = (_num_experts(config), config["hidden_size"], config["moe_intermediate_size"])
    return dict(_sizes(config)) | {"ffn_down_exps": stack}


GEMMA4_MOE = replace(
    GEMMA4,
    marker="expert_count",
    read_config=_read_experts,
    write_metadata=_expert_metadata,
    sizes=_expert_sizes,
    layer=dict(GEMMA4.layer)
    | {
        "router.proj": "ffn_gate_inp",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
    },
    parameters=dict(GEMMA4.parameters)
    | {
        "router.scale": ("ffn_gate_inp.scale",),
        "router.per_expert_scale": ("ffn_down_exps.scale",),
        "experts.gate_up_proj": ("ffn_gate_up_exps.weight",),
        "experts.down_proj": ("ffn_down_exps.weight",),
    },
)
