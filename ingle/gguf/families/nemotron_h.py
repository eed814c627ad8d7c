"""Nemotron-H: each layer is one of Mamba 2, attention without positions, a feed-forward network, or experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import require_values
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.families.mamba import mamba2_layer, mamba2_parameters, mamba2_rules, ssm_metadata
from ingle.gguf.rotary import head_size

_MAMBA, _ATTENTION = "linear_attention", "full_attention"


def _by_layer(file: GgufFile, values: ArchitectureValues, key: str) -> list[int]:
    found, num_layers = values.get(key), values.integer("block_count")
    if not isinstance(found, list) or len(found) != num_layers or any(type(each) is not int for each in found):
        raise GgufError(
            f"The file does not have {key} for each of {num_layers:,} layers.",
            where=f"{file.path}, {values.architecture}.{key}",
        )
    return found


def _read(file: GgufFile, values: ArchitectureValues, wide: str) -> dict[str, Any]:
    """Returns the config; ``wide`` is the type of layers with a feed-forward network."""
    heads, inner = (_by_layer(file, values, key) for key in ("attention.head_count_kv", "feed_forward_length"))
    num_heads, mixer = values.integer("ssm.time_step_rank"), values.integer("ssm.inner_size")
    kinds = [_ATTENTION if kv else wide if ff else _MAMBA for kv, ff in zip(heads, inner, strict=True)]
    return {
        "layers_block_type": kinds,
        "hidden_size": values.integer("embedding_length"),
        "intermediate_size": max(inner) or 1,
        "num_attention_heads": values.integer("attention.head_count"),
        "num_key_value_heads": max(heads) or 1,
        "head_dim": values.integer("attention.key_length"),
        "max_position_embeddings": values.integer("context_length"),
        "layer_norm_epsilon": values.number("attention.layer_norm_rms_epsilon"),
        "mamba_num_heads": num_heads,
        "mamba_head_dim": mixer // num_heads,
        "n_groups": values.integer("ssm.group_count"),
        "ssm_state_size": values.integer("ssm.state_size"),
        "conv_kernel": values.integer("ssm.conv_kernel"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
        "attention_bias": any(name.endswith("attn_output.bias") for name in file.tensors),
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in file.tensors),
        "use_bias": False,
        "mamba_proj_bias": False,
    }


def _metadata(config: Config, wide: str, inner: str) -> dict[str, Any]:
    """Returns the metadata; ``inner`` is the key of the width of layers of type ``wide``."""
    kinds, head_dim = list(config["layers_block_type"]), head_size(config)
    if set(kinds) - {_MAMBA, _ATTENTION, wide}:
        raise GgufError(
            "llama.cpp does not compute layers with experts and layers with plain networks in one model.",
            where="layers_block_type",
        )
    require_values(config, mlp_hidden_act="relu2", mamba_hidden_act="silu", use_bias=False, mamba_proj_bias=False)
    epsilon, kv_heads = float(config["layer_norm_epsilon"]), config["num_key_value_heads"]
    mixer = ssm_metadata(
        heads=config["mamba_num_heads"],
        inner=config["mamba_num_heads"] * config["mamba_head_dim"],
        state=config["ssm_state_size"],
        groups=config["n_groups"],
        kernel=config["conv_kernel"],
    )
    return mixer | {
        "block_count": len(kinds),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": [config[inner] if kind == wide else 0 for kind in kinds],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": [kv_heads if kind == _ATTENTION else 0 for kind in kinds],
        "attention.layer_norm_epsilon": epsilon,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": config["vocab_size"],
    }


def _sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    kinds, hidden = config["layers_block_type"], config["hidden_size"]
    found = {"attn_q": (config["num_attention_heads"] * config["head_dim"], hidden)} if _ATTENTION in kinds else {}
    return found | ({"ffn_up": (config["intermediate_size"], hidden)} if "mlp" in kinds else {})


_LAYER = {
    "norm": "attn_norm",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
} | mamba2_layer("mixer")
_TOP = {"model.embeddings": "token_embd", "model.norm_f": "output_norm", "lm_head": "output"}

NEMOTRON_H = GgufFamily(
    architecture="nemotron_h",
    model_type="nemotron_h",
    class_name="NemotronHForCausalLM",
    read_config=lambda file, values: _read(file, values, "mlp"),
    write_metadata=lambda config: _metadata(config, "mlp", "intermediate_size"),
    layer=_LAYER | {"mixer.up_proj": "ffn_up", "mixer.down_proj": "ffn_down"},
    parameters=mamba2_parameters("mixer"),
    rules=mamba2_rules("mixer", "n_groups"),
    sizes=_sizes,
    top=_TOP,
)


def _read_experts(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    if values.get("moe_latent_size") or values.integer("expert_group_count", 1, low=0) > 1:
        raise GgufError("Experts of latent inputs or in groups are not supported.", where=str(file.path))
    return _read(file, values, "moe") | {
        "n_routed_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": values.integer("expert_shared_feed_forward_length"),
        "routed_scaling_factor": values.number("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(values.get("expert_weights_norm", False)),
    }


def _expert_metadata(config: Config) -> dict[str, Any]:
    require_values(config, n_group=1, n_shared_experts=1, moe_latent_size=None, mlp_bias=False)
    return _metadata(config, "moe", "moe_intermediate_size") | {
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "expert_shared_count": 1,
        "expert_group_count": 1,
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_weights_scale": float(config["routed_scaling_factor"]),
    }


def _expert_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    stack = (config["n_routed_experts"], config["moe_intermediate_size"], config["hidden_size"])
    return dict(_sizes(config)) | {"ffn_up_exps": stack}


NEMOTRON_H_MOE = GgufFamily(
    architecture="nemotron_h_moe",
    model_type="nemotron_h",
    class_name="NemotronHForCausalLM",
    read_config=_read_experts,
    write_metadata=_expert_metadata,
    layer=_LAYER
    | {
        "mixer.gate": "ffn_gate_inp",
        "mixer.shared_experts.up_proj": "ffn_up_shexp",
        "mixer.shared_experts.down_proj": "ffn_down_shexp",
    },
    parameters=mamba2_parameters("mixer")
    | {
        "mixer.gate.e_score_correction_bias": ("exp_probs_b.bias",),
        "mixer.experts.up_proj": ("ffn_up_exps.weight",),
        "mixer.experts.down_proj": ("ffn_down_exps.weight",),
    },
    rules=mamba2_rules("mixer", "n_groups"),
    sizes=_expert_sizes,
    top=_TOP,
)
