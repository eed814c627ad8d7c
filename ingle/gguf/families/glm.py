"""GLM-4, whose gate and up projections are one matrix, and GLM-4.5, which has experts after a few dense layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    HEAD_NORMS,
    TWO_NORMS,
    attention_sizes,
    experts,
    plain_metadata,
    read_decoder,
    require_values,
    rotated_metadata,
)
from ingle.gguf.families.family import Config, GgufFamily


def _read_glm4(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return read_decoder(file, values, partial=True) | {"attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _glm4_metadata(config: Config) -> dict[str, Any]:
    require_values(config, hidden_act="silu")
    return plain_metadata(config) | rotated_metadata(config)


GLM4 = GgufFamily(
    architecture="glm4",
    model_type="glm4",
    class_name="Glm4ForCausalLM",
    read_config=_read_glm4,
    write_metadata=_glm4_metadata,
    layer=ATTENTION
    | TWO_NORMS
    | {
        "post_self_attn_layernorm": "post_attention_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_mlp_layernorm": "post_ffw_norm",
    },
    sizes=lambda config: attention_sizes(config) | {"ffn_up": (2 * config["intermediate_size"], config["hidden_size"])},
)

#: llama.cpp's number of the function that routers end with.
_SIGMOID = 2


def _read_moe(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    if values.integer("expert_group_count", 1, low=0) > 1:
        raise GgufError("Experts in groups are not supported.", where=str(file.path))
    config = read_decoder(file, values, partial=True)
    return config | {
        # Layers that predict further tokens follow the others; transformers has none.
        "num_hidden_layers": config["num_hidden_layers"] - values.integer("nextn_predict_layers", 0, low=0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "n_routed_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "n_shared_experts": values.integer("expert_shared_count"),
        "first_k_dense_replace": values.integer("leading_dense_block_count", 0, low=0),
        "routed_scaling_factor": values.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(values.get("expert_weights_norm", False)),
    }


def _moe_metadata(config: Config) -> dict[str, Any]:
    require_values(config, hidden_act="silu", n_group=1)
    return (
        plain_metadata(config)
        | rotated_metadata(config)
        | {
            "expert_count": config["n_routed_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_count": config["n_shared_experts"],
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_weights_scale": float(config["routed_scaling_factor"]),
            "expert_weights_norm": bool(config["norm_topk_prob"]),
            "expert_gating_func": _SIGMOID,
        }
    )


def _moe_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    stack = (config["n_routed_experts"], config["moe_intermediate_size"], config["hidden_size"])
    return attention_sizes(config) | {"ffn_up_exps": stack}


GLM4_MOE = GgufFamily(
    architecture="glm4moe",
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    read_config=_read_moe,
    write_metadata=_moe_metadata,
    layer=ATTENTION
    | HEAD_NORMS
    | FEED_FORWARD
    | {
        "post_attention_layernorm": "post_attention_norm",
        "mlp.gate": "ffn_gate_inp",
        "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
        "mlp.shared_experts.up_proj": "ffn_up_shexp",
        "mlp.shared_experts.down_proj": "ffn_down_shexp",
    },
    parameters=experts("mlp.experts") | {"mlp.gate.e_score_correction_bias": ("exp_probs_b.bias",)},
    sizes=_moe_sizes,
)
