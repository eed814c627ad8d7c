"""Decoders with rotary embeddings and layer norms: StarCoder 2, StableLM, Nemotron, Phi-2 and GPT-NeoX."""

from __future__ import annotations

from typing import Any

from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import (
    ATTENTION,
    FEED_FORWARD,
    TWO_NORMS,
    attention_sizes,
    decoder_metadata,
    decoder_sizes,
    plain_metadata,
    read_decoder,
    require_values,
    rope_scaling,
    rotated_metadata,
)
from ingle.gguf.families.family import Config, GgufFamily, plus_one, split_heads

_STARCODER2 = "norm_epsilon"


def _starcoder2_metadata(config: Config) -> dict[str, Any]:
    require_values(config, hidden_act="gelu_pytorch_tanh", use_bias=True)
    return decoder_metadata(config, layer_norm=_STARCODER2) | rope_scaling(config)


STARCODER2 = GgufFamily(
    architecture="starcoder2",
    model_type="starcoder2",
    class_name="Starcoder2ForCausalLM",
    read_config=lambda file, values: read_decoder(file, values, layer_norm=_STARCODER2) | {"sliding_window": None},
    write_metadata=_starcoder2_metadata,
    layer=ATTENTION | TWO_NORMS | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    sizes=decoder_sizes,
)

_STABLELM = "layer_norm_eps"


def _read_stablelm(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    is_parallel = "blk.0.ffn_norm.weight" not in file.tensors
    return read_decoder(file, values, partial=True, layer_norm=_STABLELM) | {
        "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "qk_layernorm": False,
        "use_parallel_residual": is_parallel,
    }


def _stablelm_metadata(config: Config) -> dict[str, Any]:
    require_values(config, qk_layernorm=False, hidden_act="silu")
    values = plain_metadata(config, layer_norm=_STABLELM) | rotated_metadata(config)
    return values | {"use_parallel_residual": bool(config.get("use_parallel_residual"))}


STABLELM = GgufFamily(
    architecture="stablelm",
    model_type="stablelm",
    class_name="StableLmForCausalLM",
    read_config=_read_stablelm,
    write_metadata=_stablelm_metadata,
    layer=ATTENTION | FEED_FORWARD | TWO_NORMS,
    sizes=decoder_sizes,
    is_tied=None,
)

_NEMOTRON = "norm_eps"


def _read_nemotron(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return read_decoder(file, values, partial=True, layer_norm=_NEMOTRON) | {
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _nemotron_metadata(config: Config) -> dict[str, Any]:
    require_values(config, hidden_act="relu2")
    return plain_metadata(config, layer_norm=_NEMOTRON) | rotated_metadata(config)


NEMOTRON = GgufFamily(
    architecture="nemotron",
    model_type="nemotron",
    class_name="NemotronForCausalLM",
    read_config=_read_nemotron,
    write_metadata=_nemotron_metadata,
    layer=ATTENTION | TWO_NORMS | {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    rules=dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"), plus_one),
    sizes=decoder_sizes,
    is_tied=None,
)

_PHI = "layer_norm_eps"


def _phi_metadata(config: Config) -> dict[str, Any]:
    require_values(config, qk_layernorm=False, hidden_act="gelu_new")
    return plain_metadata(config, layer_norm=_PHI) | rotated_metadata(config)


PHI2 = GgufFamily(
    architecture="phi2",
    model_type="phi",
    class_name="PhiForCausalLM",
    read_config=lambda file, values: read_decoder(file, values, partial=True, layer_norm=_PHI),
    write_metadata=_phi_metadata,
    layer={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.dense": "attn_output",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    },
    sizes=lambda config: attention_sizes(config) | {"ffn_up": (config["intermediate_size"], config["hidden_size"])},
    top={"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
    is_tied=None,
)

_NEOX = "layer_norm_eps"


def _read_neox(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return read_decoder(file, values, partial=True, layer_norm=_NEOX) | {
        "hidden_act": "gelu",
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
        "use_parallel_residual": bool(values.get("use_parallel_residual", True)),
    }


def _neox_metadata(config: Config) -> dict[str, Any]:
    require_values(config, hidden_act="gelu", attention_bias=True)
    parallel = bool(config.get("use_parallel_residual", True))
    values = plain_metadata(config, layer_norm=_NEOX) | rotated_metadata(config)
    return values | {"use_parallel_residual": parallel, "attention.head_count_kv": config["num_attention_heads"]}


GPT_NEOX = GgufFamily(
    architecture="gptneox",
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    read_config=_read_neox,
    write_metadata=_neox_metadata,
    layer={
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    rules={"attention.query_key_value": split_heads("num_attention_heads")},
    sizes=lambda config: {
        "attn_qkv": (3 * config["hidden_size"], config["hidden_size"]),
        "ffn_up": (config["intermediate_size"], config["hidden_size"]),
    },
    top={"gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "lm_head": "output"},
    decoder="gpt_neox",
    is_tied=None,
)
