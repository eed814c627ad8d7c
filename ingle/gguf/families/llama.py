"""Llama, Mistral and Mixtral, which are one architecture in llama.cpp."""

from __future__ import annotations

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
    read_decoder,
    refuse_windows,
    rope_scaling,
)
from ingle.gguf.families.family import Config, GgufFamily, interleave
from ingle.gguf.rotary import head_size

#: llama.cpp rotates neighboring pairs of features, transformers rotates halves of a head.
INTERLEAVED = {
    "self_attn.q_proj": interleave("num_attention_heads"),
    "self_attn.k_proj": interleave("num_key_value_heads"),
}


def _read_llama(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return read_decoder(file, values) | {
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }


def _llama_metadata(config: Config) -> dict[str, Any]:
    refuse_windows(config)
    return decoder_metadata(config) | {"rope.dimension_count": head_size(config)} | rope_scaling(config)


LLAMA = GgufFamily(
    architecture="llama",
    model_type="llama",
    class_name="LlamaForCausalLM",
    read_config=_read_llama,
    write_metadata=_llama_metadata,
    layer=ATTENTION | FEED_FORWARD | TWO_NORMS,
    rules=INTERLEAVED,
    sizes=decoder_sizes,
    also=("mistral",),
)


def _read_mixtral(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return read_decoder(file, values) | {
        "num_local_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "sliding_window": None,
    }


def _mixtral_metadata(config: Config) -> dict[str, Any]:
    if config.get("sliding_window"):
        raise GgufError("llama.cpp does not support sliding windows for this architecture.", where="sliding_window")
    return _llama_metadata(config) | {
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
    }


MIXTRAL = GgufFamily(
    architecture="llama",
    model_type="mixtral",
    marker="expert_count",
    class_name="MixtralForCausalLM",
    read_config=_read_mixtral,
    write_metadata=_mixtral_metadata,
    layer=ATTENTION | TWO_NORMS | {"mlp.gate": "ffn_gate_inp"},
    parameters=experts("mlp.experts"),
    rules=INTERLEAVED,
    sizes=lambda config: (
        attention_sizes(config)
        | {"ffn_up_exps": (config["num_local_experts"], config["intermediate_size"], config["hidden_size"])}
    ),
)
