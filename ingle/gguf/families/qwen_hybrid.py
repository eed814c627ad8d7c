"""Qwen3-Next and Qwen3.5: gated delta rules in most layers, attention in every fourth.

transformers groups the value heads of the delta rule by key head. A file of Qwen3-Next has q, k, v and z one after the
other, each for all heads. In a file of Qwen3.5 the value heads of all key heads alternate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    FUSED_EXPERTS,
    HEAD_NORMS,
    decoder_metadata,
    experts,
    read_decoder,
)
from ingle.gguf.families.family import Change, Config, GgufFamily, Rule, negative_exp, plus_one, squeeze
from ingle.gguf.families.mamba import ssm_metadata
from ingle.gguf.families.qwen import SHARED_EXPERT, expert_metadata, expert_sizes, flat, read_experts
from ingle.gguf.rotary import head_size, rotary_parameters

_LAYER = (
    ATTENTION
    | HEAD_NORMS
    | {
        "post_attention_layernorm": "post_attention_norm",
        "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.norm": "ssm_norm",
        "linear_attn.out_proj": "ssm_out",
    }
)
_PARAMETERS = {"linear_attn.A_log": ("ssm_a",), "linear_attn.dt_bias": ("ssm_dt.bias",)}
_NORMS: dict[str, Rule] = dict.fromkeys(
    ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "model.norm"), plus_one
)


def _interval(config: Config) -> int:
    """Returns every how many layers there is one with attention.

    Raises:
        GgufError: Layers with attention are not at equal distances.
    """
    kinds = list(config["layer_types"])
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if kinds != _layer_types(len(kinds), every):
        raise GgufError("llama.cpp requires attention at equal distances in this architecture.", where="layer_types")
    return every


def _layer_types(num_layers: int, every: int) -> list[str]:
    return ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(num_layers)]


def _read(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = read_decoder(file, values, partial=True)
    # Layers that predict further tokens follow the others; transformers has none.
    num_layers = config["num_hidden_layers"] - values.integer("nextn_predict_layers", 0, low=0)
    value_heads = values.integer("ssm.time_step_rank")
    inner = values.integer("ssm.inner_size")
    return config | {
        "num_hidden_layers": num_layers,
        "layer_types": _layer_types(num_layers, values.integer("full_attention_interval", 4)),
        "linear_conv_kernel_dim": values.integer("ssm.conv_kernel"),
        "linear_key_head_dim": values.integer("ssm.state_size"),
        "linear_num_key_heads": values.integer("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": inner // value_heads,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
    }


def _metadata(config: Config) -> dict[str, Any]:
    rope = rotary_parameters(config)
    if rope.get("rope_type", "default") != "default":
        raise GgufError("Rotary scaling of this architecture cannot be written to GGUF.", why=f"it is {rope}")
    partial: float = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 0.25
    value_heads = config["linear_num_value_heads"]
    delta = ssm_metadata(
        heads=value_heads,
        inner=value_heads * config["linear_value_head_dim"],
        state=config["linear_key_head_dim"],
        groups=config["linear_num_key_heads"],
        kernel=config["linear_conv_kernel_dim"],
    )
    rotated = int(head_size(config) * partial)
    return (
        decoder_metadata(config)
        | delta
        | {"full_attention_interval": _interval(config), "rope.dimension_count": rotated}
    )


def _heads(config: Config) -> tuple[int, int, int, int]:
    """Returns the number of key heads, value heads per key head, and the features of each."""
    key_heads = config["linear_num_key_heads"]
    shared = config["linear_num_value_heads"] // key_heads
    return key_heads, shared, config["linear_key_head_dim"], config["linear_value_head_dim"]


def _qkvz(config: Config, shape: tuple[int, ...]) -> Change:
    key_heads, shared, key_dim, value_dim = _heads(config)
    parts = np.split(
        np.arange(shape[0], dtype=np.int64).reshape(key_heads, -1),
        np.cumsum([key_dim, key_dim, shared * value_dim]).tolist(),
        axis=1,
    )
    inner = key_heads * shared * value_dim
    return Change(rows=np.concatenate([part.reshape(-1) for part in parts]), sizes=(shape[0] - inner, inner))


QWEN3_NEXT = GgufFamily(
    architecture="qwen3next",
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    read_config=lambda file, values: _read(file, values) | read_experts(values, shared=True) | {"norm_topk_prob": True},
    write_metadata=lambda config: _metadata(config) | expert_metadata(config, shared=True),
    layer=_LAYER | SHARED_EXPERT | {"linear_attn.in_proj_ba": "ssm_ba"},
    parameters=_PARAMETERS
    | experts("mlp.experts")
    | {"linear_attn.in_proj_qkvz.weight": ("attn_qkv.weight", "attn_gate.weight")},
    fused={"linear_attn.in_proj_qkvz.weight": "ssm_in.weight"},
    rules=_NORMS
    | {
        "linear_attn.in_proj_qkvz.weight": _qkvz,
        "linear_attn.conv1d.weight": squeeze,
        "linear_attn.A_log": negative_exp,
        "mlp.shared_expert_gate": flat,
    },
    sizes=expert_sizes,
)


def _tiled(config: Config, head_dim: int) -> NDArray[np.int64] | None:
    """Returns the order of value heads in a file of Qwen3.5; None if each key head has one."""
    key_heads, shared, _, _ = _heads(config)
    if shared == 1:
        return None
    rows = np.arange(key_heads * shared * head_dim, dtype=np.int64).reshape(key_heads, shared, head_dim)
    return np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(-1)


def _after_keys(config: Config, shape: tuple[int, ...]) -> Change:
    """The rule of the rows for q, k and v: only those for v move."""
    key_heads, _, key_dim, value_dim = _heads(config)
    first, moved = 2 * key_heads * key_dim, _tiled(config, value_dim)
    rows = None if moved is None else np.concatenate([np.arange(first, dtype=np.int64), first + moved])
    return Change(rows=rows)


def _convolution(config: Config, shape: tuple[int, ...]) -> Change:
    return Change(rows=_after_keys(config, shape).rows, shape=(shape[0], shape[-1]))


def _out(config: Config, shape: tuple[int, ...]) -> Change:
    return Change(columns=_tiled(config, 1), column_width=config["linear_value_head_dim"])


def _by_head(config: Config, shape: tuple[int, ...]) -> Change:
    return Change(rows=_tiled(config, 1))


_TILED: dict[str, Rule] = {
    "linear_attn.in_proj_qkv": _after_keys,
    "linear_attn.conv1d.weight": _convolution,
    "linear_attn.in_proj_z": lambda config, shape: Change(rows=_tiled(config, config["linear_value_head_dim"])),
    "linear_attn.in_proj_a": _by_head,
    "linear_attn.in_proj_b": _by_head,
    "linear_attn.dt_bias": _by_head,
    "linear_attn.A_log": lambda config, shape: Change(rows=_tiled(config, 1), is_negative_exp=True),
    "linear_attn.out_proj": _out,
}
_PROJECTIONS = {
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
}


def _read_qwen35(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config, sections = _read(file, values), values.get("rope.dimension_sections")
    if not isinstance(sections, list) or len(sections) < 3:
        raise GgufError(
            "The sections of the rotary embeddings are missing.", where=f"{values.architecture}.rope.dimension_sections"
        )
    # A text has the same position in all sections, so they only matter together with images.
    config["rope_parameters"] |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    return config


def _qwen35_metadata(config: Config) -> dict[str, Any]:
    values = _metadata(config)
    sections = rotary_parameters(config).get("mrope_section")
    if sections is None:  # as transformers' default, for the number of rotated pairs
        pairs = values["rope.dimension_count"] // 2
        sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return values | {"rope.dimension_sections": [*sections, 0]}


def _sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    return {"ffn_up": (config["intermediate_size"], config["hidden_size"])}


QWEN35 = GgufFamily(
    architecture="qwen35",
    model_type="qwen3_5_text",
    class_name="Qwen3_5ForCausalLM",
    read_config=_read_qwen35,
    write_metadata=_qwen35_metadata,
    layer=_LAYER | FEED_FORWARD | _PROJECTIONS,
    parameters=_PARAMETERS,
    rules=_NORMS | _TILED,
    sizes=_sizes,
)


def _read_qwen35_moe(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    config = _read_qwen35(file, values) | read_experts(values, shared=True)
    return {key: value for key, value in config.items() if key not in ("decoder_sparse_step", "mlp_only_layers")}


QWEN35_MOE = GgufFamily(
    architecture="qwen35moe",
    model_type="qwen3_5_moe_text",
    class_name="Qwen3_5MoeForCausalLM",
    read_config=_read_qwen35_moe,
    write_metadata=lambda config: _qwen35_metadata(config) | expert_metadata(config, shared=True),
    layer=_LAYER | SHARED_EXPERT | _PROJECTIONS,
    parameters=_PARAMETERS | experts("mlp.experts"),
    fused={"mlp.experts.gate_up_proj": FUSED_EXPERTS},
    rules=_NORMS | _TILED | {"mlp.shared_expert_gate": flat},
    sizes=expert_sizes,
)
