"""LFM 2: short convolutions in most layers, attention in the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import decoder_metadata, experts, read_decoder, require_values
from ingle.gguf.families.family import Config, GgufFamily, squeeze


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    heads, config = values.get("attention.head_count_kv"), read_decoder(file, values)
    if not isinstance(heads, list) or len(heads) != config["num_hidden_layers"]:
        raise GgufError(
            "The file does not have a number of key heads for each layer.",
            where=f"{file.path}, {values.architecture}.attention.head_count_kv",
        )
    return config | {
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "norm_eps": config.pop("rms_norm_eps"),
        "conv_L_cache": values.integer("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.conv.bias") for name in file.tensors),
        "block_auto_adjust_ff_dim": False,  # the file has the adjusted size
    }


def _metadata(config: Config) -> dict[str, Any]:
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return decoder_metadata(config) | {
        "feed_forward_length": _feed_forward(config),
        "attention.head_count_kv": [heads if kind == "full_attention" else 0 for kind in config["layer_types"]],
        "attention.layer_norm_rms_epsilon": float(config["norm_eps"]),
        "shortconv.l_cache": config["conv_L_cache"],
    }


def _feed_forward(config: Config) -> int:
    """Returns the size of the feed-forward network as ``Lfm2MLP`` computes it."""
    size = int(config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim", True):
        return size
    size, multiple, factor = int(2 * size / 3), config["block_multiple_of"], config["block_ffn_dim_multiplier"]
    return size if factor is None else -(-int(factor * size) // multiple) * multiple


def _sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    return {"ffn_up": (config["intermediate_size"], hidden), "attn_q": (hidden, hidden)}


LFM2 = GgufFamily(
    architecture="lfm2",
    model_type="lfm2",
    class_name="Lfm2ForCausalLM",
    read_config=_read,
    write_metadata=_metadata,
    layer={
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "conv.conv": "shortconv.conv",
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w3": "ffn_up",
        "feed_forward.w2": "ffn_down",
    },
    rules={"conv.conv.weight": squeeze},
    sizes=_sizes,
    top={"model.embed_tokens": "token_embd", "model.embedding_norm": "token_embd_norm", "lm_head": "output"},
)

#: llama.cpp's number of the function that routers end with.
_SIGMOID = 2


def _read_moe(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = {key: value for key, value in _read(file, values).items() if key != "block_auto_adjust_ff_dim"}
    return config | {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "num_dense_layers": values.integer("leading_dense_block_count", 0, low=0),
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def _moe_metadata(config: Config) -> dict[str, Any]:
    require_values(config, use_expert_bias=True, norm_topk_prob=True, routed_scaling_factor=1.0)
    return _metadata(dict(config) | {"block_auto_adjust_ff_dim": False}) | {
        "expert_count": _num_experts(config),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "leading_dense_block_count": config["num_dense_layers"],
        "expert_gating_func": _SIGMOID,
    }


def _num_experts(config: Config) -> int:
    return int(config.get("num_experts") or config["num_local_experts"])


LFM2_MOE = replace(
    LFM2,
    architecture="lfm2moe",
    model_type="lfm2_moe",
    class_name="Lfm2MoeForCausalLM",
    read_config=_read_moe,
    write_metadata=_moe_metadata,
    layer=dict(LFM2.layer) | {"feed_forward.gate": "ffn_gate_inp"},
    parameters=experts("feed_forward.experts") | {"feed_forward.expert_bias": ("exp_probs_b.bias",)},
    sizes=lambda config: {
        "ffn_up_exps": (_num_experts(config), config["moe_intermediate_size"], config["hidden_size"])
    },
)
