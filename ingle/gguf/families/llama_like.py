"""Decoders that differ from Llama in a detail: SmolLM 3, Ministral 3, Arcee, Seed-OSS, ERNIE 4.5 and EXAONE 4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    HEAD_NORMS,
    MOST_LAYERS,
    TWO_NORMS,
    decoder_metadata,
    decoder_sizes,
    every_nth,
    plain_metadata,
    read_decoder,
    read_windows,
    require_values,
    rope_scaling,
    window_metadata,
)
from ingle.gguf.families.family import Config, GgufFamily
from ingle.gguf.families.llama import LLAMA
from ingle.gguf.families.olmo import POST_NORMS
from ingle.gguf.rotary import head_size, rotary_parameters

_DENSE = ATTENTION | FEED_FORWARD | TWO_NORMS


def _rotates(num_layers: int) -> list[int]:
    return [int(kind == "sliding_attention") for kind in every_nth(num_layers, 4)]


def _read_smollm3(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return LLAMA.read_config(file, values) | {"no_rope_layer_interval": 4}


def _smollm3_metadata(config: Config) -> dict[str, Any]:
    require_values(config, no_rope_layers=_rotates(config["num_hidden_layers"]), attention_bias=False, mlp_bias=False)
    return LLAMA.write_metadata(config)


SMOLLM3 = replace(
    LLAMA,
    architecture="smollm3",
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    read_config=_read_smollm3,
    write_metadata=_smollm3_metadata,
    also=(),
)

#: Metadata of Ministral 3 and the rotary parameters that they are.
_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    "attention.temperature_scale": "llama_4_scaling_beta",
}
_OWN_YARN = {"type", "max_position_embeddings", "mscale", *_YARN.values()}


def _read_ministral3(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values)
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        raise GgufError("Ministral 3 without YaRN is not supported.", where=f"{file.path}, rope.scaling.type")
    rope |= {key: values.number(name) for name, key in _YARN.items()} | {"mscale": 1.0}
    return config


def _ministral3_metadata(config: Config) -> dict[str, Any]:
    rope = rotary_parameters(config)
    require_values(rope, rope_type="yarn", mscale=1.0)
    plain = dict(config) | {"rope_parameters": {key: rope[key] for key in rope if key not in _OWN_YARN}}
    scaling = {name: float(rope[key]) for name, key in _YARN.items()}
    return decoder_metadata(config) | {"rope.dimension_count": head_size(config)} | rope_scaling(plain) | scaling


MINISTRAL3 = replace(
    LLAMA,
    architecture="mistral3",
    model_type="ministral3",
    class_name="Ministral3ForCausalLM",
    read_config=_read_ministral3,
    write_metadata=_ministral3_metadata,
    marker="attention.temperature_scale",
    also=(),
)
#: The text part of Mistral Small 3.1, whose files llama.cpp's converter names after Mistral 3.
MISTRAL3 = replace(
    LLAMA,
    architecture="mistral3",
    model_type="mistral",
    class_name="MistralForCausalLM",
    read_config=lambda file, values: read_decoder(file, values) | {"sliding_window": None},
    also=(),
)

ARCEE = replace(
    LLAMA,
    architecture="arcee",
    model_type="arcee",
    class_name="ArceeForCausalLM",
    read_config=lambda file, values: read_decoder(file, values) | {"hidden_act": "relu2"},
    write_metadata=lambda config: _without_bias(config, hidden_act="relu2"),
    layer={path: tensor for path, tensor in _DENSE.items() if path != "mlp.gate_proj"},
    also=(),
)


def _without_bias(config: Config, **fixed: Any) -> dict[str, Any]:
    require_values(config, attention_bias=False, mlp_bias=False, **fixed)
    return LLAMA.write_metadata(config)


def _read_seed_oss(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    bias = "blk.0.attn_q.bias" in file.tensors
    return read_decoder(file, values) | {"attention_bias": bias, "attention_out_bias": False, "mlp_bias": False}


def _seed_oss_metadata(config: Config) -> dict[str, Any]:
    require_values(config, attention_out_bias=False, mlp_bias=False)
    return plain_metadata(config)


SEED_OSS = GgufFamily(
    architecture="seed_oss",
    model_type="seed_oss",
    class_name="SeedOssForCausalLM",
    read_config=_read_seed_oss,
    write_metadata=_seed_oss_metadata,
    layer=ATTENTION | FEED_FORWARD | {"post_attention_layernorm": "post_attention_norm"},
    sizes=decoder_sizes,
)


def _ernie_metadata(config: Config) -> dict[str, Any]:
    require_values(config, use_bias=False, hidden_act="silu")
    return plain_metadata(config) | {"rope.dimension_count": head_size(config)}


ERNIE4_5 = GgufFamily(
    architecture="ernie4_5",
    model_type="ernie4_5",
    class_name="Ernie4_5ForCausalLM",
    read_config=read_decoder,
    write_metadata=_ernie_metadata,
    layer=_DENSE,
    sizes=decoder_sizes,
)

#: Number of layers of the model with windows; llama.cpp computes no windows in others.
_WITH_WINDOWS = 64


def _read_exaone4(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values)
    num_layers = config["num_hidden_layers"]
    if num_layers == _WITH_WINDOWS:
        return config | read_windows(file, values, num_layers)
    return config | {"sliding_window": None, "layer_types": ["full_attention"] * min(num_layers, MOST_LAYERS)}


def _exaone4_metadata(config: Config) -> dict[str, Any]:
    if config["num_hidden_layers"] == _WITH_WINDOWS:
        if not config.get("sliding_window"):
            raise GgufError("llama.cpp computes windows in an EXAONE 4 of 64 layers.", where="sliding_window")
        return decoder_metadata(config) | rope_scaling(config) | window_metadata(config)
    require_values(config, sliding_window=None)
    return decoder_metadata(config) | rope_scaling(config)


EXAONE4 = GgufFamily(
    architecture="exaone4",
    model_type="exaone4",
    class_name="Exaone4ForCausalLM",
    read_config=_read_exaone4,
    write_metadata=_exaone4_metadata,
    layer={path: tensor for path, tensor in _DENSE.items() if path not in ("input_layernorm", *TWO_NORMS)}
    | POST_NORMS
    | HEAD_NORMS,
    sizes=decoder_sizes,
)
