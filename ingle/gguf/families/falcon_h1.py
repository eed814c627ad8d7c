"""Falcon-H1: attention and Mamba 2 in parallel in every layer.

llama.cpp's converter multiplies the multipliers of the config into the weights. A model that is read from a file
therefore has multipliers of 1, and an adapter that is trained on it does not fit the published model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import ATTENTION, attention_sizes, decoder_metadata, read_decoder, rope_scaling
from ingle.gguf.families.family import Change, Config, GgufFamily, Rule
from ingle.gguf.families.mamba import (
    mamba2_layer,
    mamba2_metadata,
    mamba2_parameters,
    mamba2_rules,
    read_mamba2,
)

_MULTIPLIERS = (
    *("lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_in_multiplier"),
    *("attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"),
)


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return (
        read_decoder(file, values)
        | read_mamba2(file, values)
        | dict.fromkeys(_MULTIPLIERS, 1.0)
        | {
            "mlp_multipliers": [1.0, 1.0],
            "ssm_multipliers": [1.0] * 5,
            "mamba_d_ssm": values.integer("ssm.inner_size"),
            "mamba_rms_norm": "blk.0.ssm_norm.weight" in file.tensors,
            "mamba_norm_before_gate": False,
        }
    )


def _scaled(factor: Callable[[Config], float]) -> Rule:
    return lambda config, shape: Change(scale=float(factor(config)))


def _input(config: Config, shape: tuple[int, ...]) -> Change:
    """The rows of the input projection are gate, x, B, C and the time steps of the heads."""
    groups = config["mamba_n_groups"] * config["mamba_d_state"]
    sizes = [config["mamba_d_ssm"]] * 2 + [groups] * 2 + [config["mamba_n_heads"]]
    factors = np.repeat(np.array(config["ssm_multipliers"], dtype=np.float32), sizes)
    return Change(scale=factors * np.float32(config["ssm_in_multiplier"]))


def _sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    return attention_sizes(config) | {"ffn_up": (config["intermediate_size"], config["hidden_size"])}


FALCON_H1 = GgufFamily(
    architecture="falcon-h1",
    model_type="falcon_h1",
    class_name="FalconH1ForCausalLM",
    read_config=_read,
    write_metadata=lambda config: decoder_metadata(config) | rope_scaling(config) | mamba2_metadata(config),
    layer=ATTENTION
    | mamba2_layer("mamba")
    | {
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
    parameters=mamba2_parameters("mamba") | {"pre_ff_layernorm.weight": ("ffn_norm",)},
    rules=mamba2_rules("mamba", "mamba_n_groups")
    | {
        "mamba.in_proj": _input,
        "mamba.out_proj": _scaled(lambda config: config["ssm_out_multiplier"]),
        "self_attn.q_proj": _scaled(lambda config: config["attention_in_multiplier"]),
        "self_attn.k_proj": _scaled(lambda config: config["attention_in_multiplier"] * config["key_multiplier"]),
        "self_attn.v_proj": _scaled(lambda config: config["attention_in_multiplier"]),
        "self_attn.o_proj": _scaled(lambda config: config["attention_out_multiplier"]),
        "feed_forward.gate_proj": _scaled(lambda config: config["mlp_multipliers"][0]),
        "feed_forward.down_proj": _scaled(lambda config: config["mlp_multipliers"][1]),
        "model.embed_tokens": _scaled(lambda config: config["embedding_multiplier"]),
        "lm_head": _scaled(lambda config: config["lm_head_multiplier"]),
    },
    sizes=_sizes,
    top={"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
)
