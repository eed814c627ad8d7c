"""Granite: decoders with multipliers, with and without experts, and their hybrids with Mamba 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    TWO_NORMS,
    attention_sizes,
    decoder_metadata,
    decoder_sizes,
    experts,
    plain_metadata,
    read_decoder,
)
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.families.llama import INTERLEAVED
from ingle.gguf.families.mamba import (
    mamba2_layer,
    mamba2_metadata,
    mamba2_parameters,
    mamba2_rules,
    read_mamba2,
)
from ingle.gguf.rotary import head_size

#: The multipliers of the config and their metadata.
_MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values)
    return config | {key: values.number(name, 1.0) for key, name in _MULTIPLIERS.items()}


def _multipliers(config: Config) -> dict[str, Any]:
    found = {name: float(config[key]) for key, name in _MULTIPLIERS.items()}
    return found | {"rope.dimension_count": head_size(config)}


def _read_granite(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return _read(file, values) | {
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


GRANITE = GgufFamily(
    architecture="granite",
    model_type="granite",
    class_name="GraniteForCausalLM",
    read_config=_read_granite,
    write_metadata=lambda config: plain_metadata(config) | _multipliers(config),
    layer=ATTENTION | FEED_FORWARD | TWO_NORMS,
    rules=INTERLEAVED,
    sizes=decoder_sizes,
)


def _read_experts(values: ArchitectureValues) -> dict[str, Any]:
    return {
        "num_local_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
    }


def _expert_metadata(config: Config) -> dict[str, Any]:
    return {"expert_count": config["num_local_experts"], "expert_used_count": config["num_experts_per_tok"]}


def _expert_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    return {"ffn_up_exps": (config["num_local_experts"], config["intermediate_size"], config["hidden_size"])}


GRANITE_MOE = GgufFamily(
    architecture="granitemoe",
    model_type="granitemoe",
    class_name="GraniteMoeForCausalLM",
    read_config=lambda file, values: _read(file, values) | _read_experts(values),
    write_metadata=lambda config: plain_metadata(config) | _multipliers(config) | _expert_metadata(config),
    layer=ATTENTION | TWO_NORMS | {"block_sparse_moe.router": "ffn_gate_inp"},
    parameters=experts("block_sparse_moe.experts"),
    rules=INTERLEAVED,
    sizes=lambda config: attention_sizes(config) | dict(_expert_sizes(config)),
)


def _read_hybrid(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    heads = values.get("attention.head_count_kv")
    config = _read(file, values) | read_mamba2(file, values)
    if not isinstance(heads, list) or len(heads) != config["num_hidden_layers"]:
        raise GgufError(
            "The file does not have a number of key heads for each layer.",
            where=f"{file.path}, granitehybrid.attention.head_count_kv",
        )
    if values.get("rope.scaling.finetuned", True) is not False:
        config["position_embedding_type"] = "rope"
    inner, hidden = config["mamba_n_heads"] * config["mamba_d_head"], config["hidden_size"]
    if inner % hidden:
        raise GgufError(f"Mixers of {inner} features in a model of {hidden} are not supported.", where=str(file.path))
    kinds = ["attention" if count else "mamba" for count in heads]
    shared = values.integer("expert_shared_feed_forward_length", config["intermediate_size"])
    return config | {
        "mamba_expand": inner // hidden,
        "layer_types": kinds,
        "shared_intermediate_size": shared,
        "num_local_experts": 0,
    }


def _hybrid_metadata(config: Config) -> dict[str, Any]:
    kinds = config["layer_types"]
    if "mamba" not in kinds and "linear_attention" not in kinds:
        raise GgufError("llama.cpp has other architectures for models without Mamba layers.", where="layer_types")
    num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    values = decoder_metadata(config) | _multipliers(config) | mamba2_metadata(config)
    values["attention.head_count_kv"] = [
        num_kv_heads if kind.removeprefix("full_") == "attention" else 0 for kind in kinds
    ]
    if config.get("position_embedding_type") != "rope":
        values["rope.scaling.finetuned"] = False  # this is how llama.cpp marks a model without positions
    return values


def _dense_metadata(config: Config) -> dict[str, Any]:
    return _hybrid_metadata(config) | {"feed_forward_length": config["shared_intermediate_size"]}


def _moe_metadata(config: Config) -> dict[str, Any]:
    shared = {"expert_shared_feed_forward_length": config["shared_intermediate_size"]}
    return _hybrid_metadata(config) | _expert_metadata(config) | shared


_HYBRID_LAYER = ATTENTION | TWO_NORMS | mamba2_layer("mamba")

GRANITE_HYBRID = GgufFamily(
    architecture="granitehybrid",
    model_type="granitemoehybrid",
    class_name="GraniteMoeHybridForCausalLM",
    read_config=_read_hybrid,
    write_metadata=_dense_metadata,
    layer=_HYBRID_LAYER | {"shared_mlp.output_linear": "ffn_down"},
    parameters=mamba2_parameters("mamba") | {"shared_mlp.input_linear.weight": ("ffn_gate.weight", "ffn_up.weight")},
    rules=INTERLEAVED | mamba2_rules("mamba", "mamba_n_groups"),
    sizes=lambda config: {"ffn_up": (config["shared_intermediate_size"], config["hidden_size"])},
)
GRANITE_HYBRID_MOE = GgufFamily(
    architecture="granitehybrid",
    model_type="granitemoehybrid",
    marker="expert_count",
    class_name="GraniteMoeHybridForCausalLM",
    read_config=lambda file, values: _read_hybrid(file, values) | _read_experts(values),
    write_metadata=_moe_metadata,
    layer=_HYBRID_LAYER | {"shared_mlp.output_linear": "ffn_down_shexp", "block_sparse_moe.router": "ffn_gate_inp"},
    parameters=mamba2_parameters("mamba")
    | experts("block_sparse_moe.experts")
    | {"shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight")},
    rules=INTERLEAVED | mamba2_rules("mamba", "mamba_n_groups"),
    sizes=_expert_sizes,
)
