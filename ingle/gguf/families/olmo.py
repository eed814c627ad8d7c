"""OLMo 1, 2 and 3, and OLMoE. The second and third normalize the outputs of layers, and whole queries and keys."""

from __future__ import annotations

from typing import Any

from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    HEAD_NORMS,
    TWO_NORMS,
    attention_sizes,
    decoder_metadata,
    decoder_sizes,
    experts,
    plain_metadata,
    read_decoder,
    read_windows,
    require_values,
    rope_scaling,
    window_metadata,
)
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.families.llama import INTERLEAVED
from ingle.gguf.rotary import head_size, rotary_parameters

_CLIP = "attention.clamp_kqv"
#: OLMo's norms have no weights, and their epsilon is not in its config.
_EPSILON = "layer_norm_eps"
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PROJECTIONS = {path: tensor for path, tensor in ATTENTION.items() if path != "input_layernorm"}


def _read_olmo(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    clip = values.number(_CLIP, 0.0, zero=True)
    return read_decoder(file, values, layer_norm=_EPSILON) | {"clip_qkv": clip or None}


def _olmo_metadata(config: Config) -> dict[str, Any]:
    require_values(config, attention_bias=False)
    values = plain_metadata(dict(config) | {_EPSILON: 1e-5}, layer_norm=_EPSILON)
    clip = config.get("clip_qkv")
    return values | {"rope.dimension_count": head_size(config)} | ({} if clip is None else {_CLIP: float(clip)})


OLMO = GgufFamily(
    architecture="olmo",
    model_type="olmo",
    class_name="OlmoForCausalLM",
    read_config=_read_olmo,
    write_metadata=_olmo_metadata,
    layer=_PROJECTIONS | FEED_FORWARD,
    rules=INTERLEAVED,
    sizes=decoder_sizes,
    top={"model.embed_tokens": "token_embd", "lm_head": "output"},
)


def _olmo2_metadata(config: Config) -> dict[str, Any]:
    require_values(config, attention_bias=False, head_dim=config["hidden_size"] // config["num_attention_heads"])
    return plain_metadata(config)


OLMO2 = GgufFamily(
    architecture="olmo2",
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    read_config=read_decoder,
    write_metadata=_olmo2_metadata,
    layer=_PROJECTIONS | FEED_FORWARD | POST_NORMS | HEAD_NORMS,
    sizes=decoder_sizes,
    is_tied=None,
)


def _read_olmo3(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values)
    full = config["rope_parameters"]
    full = full.get("full_attention", full)
    local = {"rope_type": "default", "rope_theta": values.number("rope.freq_base_swa", full["rope_theta"])}
    config["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    return config | read_windows(file, values, config["num_hidden_layers"])


def _olmo3_metadata(config: Config) -> dict[str, Any]:
    require_values(config, attention_bias=False, head_dim=config["hidden_size"] // config["num_attention_heads"])
    values, rope = decoder_metadata(config) | rope_scaling(config) | window_metadata(config), rotary_parameters(config)
    local = rope.get("sliding_attention")
    # llama.cpp scales the frequencies of layers with full attention alone.
    return values | ({} if local is None else {"rope.freq_base_swa": float(local["rope_theta"])})


OLMO3 = GgufFamily(
    architecture="olmo2",
    model_type="olmo3",
    class_name="Olmo3ForCausalLM",
    read_config=_read_olmo3,
    write_metadata=_olmo3_metadata,
    layer=OLMO2.layer,
    sizes=decoder_sizes,
    is_tied=None,
    marker="attention.sliding_window",
)


def _read_olmoe(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return read_decoder(file, values) | {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "norm_topk_prob": False,
    }


def _olmoe_metadata(config: Config) -> dict[str, Any]:
    fixed = {"attention_bias": False, "norm_topk_prob": False, "clip_qkv": None}
    require_values(config, **fixed, num_key_value_heads=config["num_attention_heads"])
    return plain_metadata(config) | {
        "expert_count": _num_experts(config),
        "expert_used_count": config["num_experts_per_tok"],
    }


def _num_experts(config: Config) -> int:
    return int(config.get("num_experts") or config["num_local_experts"])


OLMOE = GgufFamily(
    architecture="olmoe",
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    read_config=_read_olmoe,
    write_metadata=_olmoe_metadata,
    layer=ATTENTION | TWO_NORMS | HEAD_NORMS | {"mlp.gate": "ffn_gate_inp"},
    parameters=experts("mlp.experts"),
    sizes=lambda config: (
        attention_sizes(config)
        | {"ffn_up_exps": (_num_experts(config), config["intermediate_size"], config["hidden_size"])}
    ),
    is_tied=None,
)
