"""Qwen 2 and 3, with and without experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    HEAD_NORMS,
    TWO_NORMS,
    attention_sizes,
    decoder_sizes,
    experts,
    plain_metadata,
    read_decoder,
)
from ingle.gguf.families.family import Change, Config, GgufFamily

QWEN2 = GgufFamily(
    architecture="qwen2",
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    read_config=read_decoder,
    write_metadata=plain_metadata,
    layer=ATTENTION | FEED_FORWARD | TWO_NORMS,
    sizes=decoder_sizes,
)

QWEN3 = GgufFamily(
    architecture="qwen3",
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    read_config=lambda file, values: read_decoder(file, values) | {"attention_bias": False},
    write_metadata=plain_metadata,
    layer=ATTENTION | FEED_FORWARD | TWO_NORMS | HEAD_NORMS,
    sizes=decoder_sizes,
)

SHARED_EXPERT = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def flat(config: Config, shape: tuple[int, ...]) -> Change:
    """The rule of the gate of the shared expert: ``[1, H]`` is ``[H]`` in a file."""
    return Change(shape=(shape[-1],))


def read_experts(values: ArchitectureValues, *, shared: bool) -> dict[str, Any]:
    """Returns the part of a config about experts in every layer."""
    found: dict[str, Any] = {
        "num_experts": values.integer("expert_count"),
        "num_experts_per_tok": values.integer("expert_used_count"),
        "moe_intermediate_size": values.integer("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if shared:
        found["shared_expert_intermediate_size"] = values.integer("expert_shared_feed_forward_length")
    return found


def _num_experts(config: Config) -> int:
    """Returns the number of experts, which transformers may also call ``num_local_experts``."""
    return int(config.get("num_experts") or config["num_local_experts"])


def expert_metadata(config: Config, *, shared: bool) -> dict[str, Any]:
    """Returns the metadata of experts in every layer.

    Raises:
        GgufError: Some layers have no experts, which llama.cpp does not support for these architectures.
    """
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise GgufError("llama.cpp requires experts in every layer of this architecture.", where="mlp_only_layers")
    found: dict[str, Any] = {
        "expert_count": _num_experts(config),
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }
    if shared:
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return found


def expert_sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Returns the shape of the stacked experts."""
    return {"ffn_up_exps": (_num_experts(config), config["moe_intermediate_size"], config["hidden_size"])}


def _require_norm(config: Config, norm: bool) -> None:
    if bool(config.get("norm_topk_prob", norm)) != norm:
        raise GgufError(
            f"llama.cpp {'always' if norm else 'never'} normalizes the weights of the chosen experts.",
            where="norm_topk_prob",
        )


def _qwen3_moe_metadata(config: Config) -> dict[str, Any]:
    _require_norm(config, True)
    return plain_metadata(config) | expert_metadata(config, shared=False)


def _qwen2_moe_metadata(config: Config) -> dict[str, Any]:
    _require_norm(config, False)
    return plain_metadata(config) | expert_metadata(config, shared=True)


QWEN3_MOE = GgufFamily(
    architecture="qwen3moe",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    read_config=lambda file, values: (
        read_decoder(file, values)
        | read_experts(values, shared=False)
        | {"attention_bias": False, "norm_topk_prob": True}
    ),
    write_metadata=_qwen3_moe_metadata,
    layer=ATTENTION | TWO_NORMS | HEAD_NORMS | {"mlp.gate": "ffn_gate_inp"},
    parameters=experts("mlp.experts"),
    sizes=lambda config: attention_sizes(config) | dict(expert_sizes(config)),
)

QWEN2_MOE = GgufFamily(
    architecture="qwen2moe",
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    read_config=lambda file, values: (
        read_decoder(file, values)
        | read_experts(values, shared=True)
        | {"qkv_bias": "blk.0.attn_q.bias" in file.tensors, "norm_topk_prob": False}
    ),
    write_metadata=_qwen2_moe_metadata,
    layer=ATTENTION | TWO_NORMS | SHARED_EXPERT,
    parameters=experts("mlp.experts"),
    rules={"mlp.shared_expert_gate": flat},
    sizes=lambda config: attention_sizes(config) | dict(expert_sizes(config)),
)
