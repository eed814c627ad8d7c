"""gpt-oss: experts whose gate and up projections alternate row by row, and attention with sinks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import ATTENTION, attention_sizes, decoder_metadata, experts, read_decoder
from ingle.gguf.families.family import Change, Config, GgufFamily
from ingle.gguf.rotary import rotary_parameters

#: What llama.cpp computes regardless of the metadata.
_FIXED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
#: The scaling of the rotary frequencies has the same details in every model.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def _alternating(config: Config, shape: tuple[int, ...]) -> Change:
    """Gate and up alternate in the rows of the parameter and follow each other in the file."""
    num_rows = shape[-1]
    rows = np.concatenate([np.arange(0, num_rows, 2), np.arange(1, num_rows, 2)])
    return Change(rows=rows, is_transposed=len(shape) == 3)


def _layer_types(num_layers: int) -> list[str]:
    return ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(num_layers)]


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values)
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"] |= _YARN
    return config | {
        "intermediate_size": values.integer("expert_feed_forward_length"),
        "num_local_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "sliding_window": values.integer("attention.sliding_window"),
        "layer_types": _layer_types(config["num_hidden_layers"]),
        "attention_bias": True,
    }


def _metadata(config: Config) -> dict[str, Any]:
    if config.get("layer_types") not in (None, _layer_types(config["num_hidden_layers"])):
        raise GgufError("llama.cpp requires full attention in every second layer.", where="layer_types")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise GgufError(f"llama.cpp always computes with {key} = {value}.", where=key)
    values = decoder_metadata(config) | {
        "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["intermediate_size"],
        "attention.sliding_window": config["sliding_window"],
    }
    rope = rotary_parameters(config)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return values
    if kind != "yarn" or any(rope.get(key, value) != value for key, value in _YARN.items()):
        raise GgufError(f"Rotary scaling of type {kind!r} cannot be written to GGUF.", why=f"rope_parameters is {rope}")
    return values | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": _YARN["beta_fast"],
        "rope.scaling.yarn_beta_slow": _YARN["beta_slow"],
    }


GPT_OSS = GgufFamily(
    architecture="gpt-oss",
    model_type="gpt_oss",
    class_name="GptOssForCausalLM",
    read_config=_read,
    write_metadata=_metadata,
    layer=ATTENTION | {"post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp"},
    parameters=experts("mlp.experts")
    | {
        "self_attn.sinks": ("attn_sinks.weight",),
        "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
        "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
    },
    rules={
        "mlp.experts.gate_up_proj": _alternating,
        "mlp.experts.gate_up_proj_bias": _alternating,
        "mlp.experts.down_proj": lambda config, shape: Change(is_transposed=True),
    },
    sizes=lambda config: (
        attention_sizes(config)
        | {"ffn_up_exps": (config["num_local_experts"], config["intermediate_size"], config["hidden_size"])}
    ),
)
