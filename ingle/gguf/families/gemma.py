"""Gemma 1, 2 and 3. transformers stores the weights of their norms minus one."""

from __future__ import annotations

from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    HEAD_NORMS,
    TWO_NORMS,
    decoder_metadata,
    decoder_sizes,
    plain_metadata,
    read_decoder,
    rope_scaling,
)
from ingle.gguf.families.family import Config, GgufFamily, Rule, plus_one
from ingle.gguf.rotary import rotary_parameters

FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
#: Every how many layers there is one with full attention.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
#: Number of layers of the models that scale attention by hidden / heads.
_LARGEST = {"gemma2": 46, "gemma3": 62}


def norms_plus_one(layer: dict[str, str]) -> dict[str, Rule]:
    """Returns the rule for every norm of a layer and the last norm."""
    return dict.fromkeys([*(name for name in layer if name.endswith("norm")), "model.norm"], plus_one)


def _metadata(architecture: str, config: Config) -> dict[str, Any]:
    num_layers = config["num_hidden_layers"]
    if config.get("layer_types") not in (None, _layer_types(architecture, num_layers)):
        raise GgufError(
            f"llama.cpp requires full attention in every {_FULL_EVERY[architecture]}th layer.", where="layer_types"
        )
    scalar = _query_scalar(
        architecture, num_layers, config["hidden_size"] // config["num_attention_heads"], int(config["head_dim"])
    )
    if config.get("query_pre_attn_scalar", scalar) != scalar:
        raise GgufError(
            f"llama.cpp scales attention by {scalar} in a model of this size.", where="query_pre_attn_scalar"
        )
    rope = rotary_parameters(config)
    values = decoder_metadata(config) | rope_scaling(config) | {"attention.sliding_window": config["sliding_window"]}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := config.get(key)) is not None:
            values[key] = float(cap)
    if "sliding_attention" in rope:
        values["rope.freq_base_swa"] = float(rope["sliding_attention"].get("rope_theta", 10000.0))
    return values


def _layer_types(architecture: str, num_layers: int) -> list[str]:
    every = _FULL_EVERY[architecture]
    return ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(num_layers)]


def _query_scalar(architecture: str, num_layers: int, hidden_per_head: int, head_dim: int) -> int:
    """Returns the square of the divisor of attention scores, which llama.cpp derives from the number of layers."""
    return hidden_per_head if num_layers == _LARGEST[architecture] else head_dim


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values)
    architecture, num_layers = values.architecture, config["num_hidden_layers"]
    is_gemma2 = architecture == "gemma2"  # has defaults in llama.cpp
    hidden_per_head = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "layer_types": _layer_types(architecture, num_layers),
        "sliding_window": values.integer("attention.sliding_window", 4096 if is_gemma2 else None),
        "query_pre_attn_scalar": _query_scalar(architecture, num_layers, hidden_per_head, config["head_dim"]),
        "attn_logit_softcapping": values.number("attn_logit_softcapping", 50.0) if is_gemma2 else None,
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0 if is_gemma2 else 0.0, zero=True)
        or None,
    }


_GEMMA_LAYER = ATTENTION | FEED_FORWARD | TWO_NORMS
_GEMMA2_LAYER = ATTENTION | FEED_FORWARD | FOUR_NORMS
_GEMMA3_LAYER = _GEMMA2_LAYER | HEAD_NORMS

GEMMA = GgufFamily(
    architecture="gemma",
    model_type="gemma",
    class_name="GemmaForCausalLM",
    read_config=read_decoder,
    write_metadata=plain_metadata,
    layer=_GEMMA_LAYER,
    rules=norms_plus_one(_GEMMA_LAYER),
    sizes=decoder_sizes,
    is_tied=True,
)
GEMMA2 = GgufFamily(
    architecture="gemma2",
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    read_config=_read,
    write_metadata=lambda config: _metadata("gemma2", config),
    layer=_GEMMA2_LAYER,
    rules=norms_plus_one(_GEMMA2_LAYER),
    sizes=decoder_sizes,
    is_tied=True,
)
GEMMA3 = GgufFamily(
    architecture="gemma3",
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    read_config=_read,
    write_metadata=lambda config: _metadata("gemma3", config),
    layer=_GEMMA3_LAYER,
    rules=norms_plus_one(_GEMMA3_LAYER),
    sizes=decoder_sizes,
)
