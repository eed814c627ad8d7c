"""Phi-3 and Phi-4: decoders with fused projections, and divisors of frequencies for short and for long texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    TWO_NORMS,
    decoder_metadata,
    read_decoder,
    rope_scaling,
    rotated_metadata,
)
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.rotary import longrope_metadata, read_longrope, rotary_parameters


def _read_phi3(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values, partial=True)
    trained = values.integer("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["rope_parameters"] |= read_longrope(file, values, trained)
    return config | {"original_max_position_embeddings": trained, "sliding_window": None}


def _phi3_metadata(config: Config) -> dict[str, Any]:
    values, rope = decoder_metadata(config) | rotated_metadata(config), rotary_parameters(config)
    longest = int(config["max_position_embeddings"])
    trained = int(config.get("original_max_position_embeddings") or longest)
    is_long = rope.get("rope_type") == "longrope"
    scaling = longrope_metadata(rope, longest, trained) if is_long else rope_scaling(config)
    return {"rope.scaling.original_context_length": trained, "attention.sliding_window": 0} | values | scaling


def _phi3_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    hidden = config["hidden_size"]
    return {"attn_qkv": (heads * config["head_dim"], hidden), "ffn_up": (2 * config["intermediate_size"], hidden)}


PHI3 = GgufFamily(
    architecture="phi3",
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    read_config=_read_phi3,
    write_metadata=_phi3_metadata,
    layer={
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
    }
    | TWO_NORMS
    | {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    sizes=_phi3_sizes,
)
