"""GPT-2, BLOOM and MPT: decoders without rotary embeddings, with fused projections and four times wider networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import ArchitectureValues, GgufFile
from ingle.gguf.families.decoder import require_values
from ingle.gguf.families.family import Change, Config, GgufFamily, split_heads

#: llama.cpp's slopes of ALiBi begin with this exponent.
_ALIBI = 8.0


def _metadata(config: Config, width: str, layers: str, heads: str, longest: int) -> dict[str, Any]:
    """Returns what the metadata of these models share; arguments are keys of the config and its longest text."""
    return {
        "block_count": config[layers],
        "context_length": longest,
        "embedding_length": config[width],
        "feed_forward_length": 4 * config[width],
        "attention.head_count": config[heads],
        "attention.head_count_kv": config[heads],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "vocab_size": config["vocab_size"],
    }


def _read(values: ArchitectureValues, width: str, layers: str, heads: str) -> dict[str, Any]:
    """Inverts :func:`_metadata`, except the longest text.

    Raises:
        GgufError: The model has fewer key heads, or another width of its feed-forward networks.
    """
    hidden, num_heads = values.integer("embedding_length"), values.integer("attention.head_count")
    for key, expected in (("attention.head_count_kv", num_heads), ("feed_forward_length", 4 * hidden)):
        if (found := values.get(key, expected)) != expected:
            raise GgufError(
                f"{values.architecture}.{key} of {str(found)[:60]} is not supported.", why=f"expected {expected}"
            )
    return {
        width: hidden,
        layers: values.integer("block_count"),
        heads: num_heads,
        "layer_norm_epsilon": values.number("attention.layer_norm_epsilon"),
    }


def _sizes(width: str) -> Any:
    def sizes(config: Config) -> Mapping[str, tuple[int, ...]]:
        hidden = config[width]
        return {"attn_qkv": (3 * hidden, hidden), "ffn_up": (4 * hidden, hidden)}

    return sizes


_GPT2 = {"width": "n_embd", "layers": "n_layer", "heads": "n_head"}


def _read_gpt2(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    return _read(values, **_GPT2) | {"n_positions": values.integer("context_length")}


def _gpt2_metadata(config: Config) -> dict[str, Any]:
    require_values(
        config,
        activation_function="gelu_new",
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        n_inner=None,
    )
    return _metadata(config, longest=config["n_positions"], **_GPT2)


def _turned(config: Config, shape: tuple[int, ...]) -> Change:
    """The rule of GPT-2's own linear layers, which store ``[in, out]``."""
    return Change(is_transposed=len(shape) == 2)


GPT2 = GgufFamily(
    architecture="gpt2",
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    read_config=_read_gpt2,
    write_metadata=_gpt2_metadata,
    layer={
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    rules=dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), _turned),
    sizes=_sizes("n_embd"),
    top={
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    decoder="transformer",
    layers="h",
)

_BLOOM = {"width": "hidden_size", "layers": "n_layer", "heads": "n_head"}
#: The length of the texts that BLOOM was trained on; it has no limit of its own.
_BLOOM_TEXT = 2048


def _bloom_metadata(config: Config) -> dict[str, Any]:
    require_values(config, apply_residual_connection_post_layernorm=False)
    return _metadata(config, longest=config.get("seq_length") or _BLOOM_TEXT, **_BLOOM)


BLOOM = GgufFamily(
    architecture="bloom",
    model_type="bloom",
    class_name="BloomForCausalLM",
    read_config=lambda file, values: _read(values, **_BLOOM) | {"seq_length": values.integer("context_length")},
    write_metadata=_bloom_metadata,
    layer={
        "input_layernorm": "attn_norm",
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    rules={"self_attention.query_key_value": split_heads("n_head")},
    sizes=_sizes("hidden_size"),
    top={
        "transformer.word_embeddings": "token_embd",
        "transformer.word_embeddings_layernorm": "token_embd_norm",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    decoder="transformer",
    layers="h",
)

_MPT = {"width": "d_model", "layers": "n_layers", "heads": "n_heads"}


def _read_mpt(file: GgufFile, values: ArchitectureValues) -> dict[str, Any]:
    if "position_embd.weight" in file.tensors or "blk.0.attn_q_norm.weight" in file.tensors:
        raise GgufError("MPT with learned positions or norms of queries is not supported.", where=str(file.path))
    clip = values.number("attention.clamp_kqv", 0.0, zero=True) or None
    return _read(values, **_MPT) | {
        "expansion_ratio": 4,
        "max_seq_len": values.integer("context_length"),
        "no_bias": True,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": int(values.number("attention.max_alibi_bias")),
            "clip_qkv": clip,
        },
    }


def _mpt_metadata(config: Config) -> dict[str, Any]:
    attention = config["attn_config"]
    require_values(config, expansion_ratio=4, no_bias=True)
    require_values(attention, alibi=True, qk_ln=False, prefix_lm=False, softmax_scale=None)
    clip = attention.get("clip_qkv")
    values = _metadata(config, longest=config["max_seq_len"], **_MPT)
    values["attention.max_alibi_bias"] = float(attention.get("alibi_bias_max") or _ALIBI)
    return values | ({} if clip is None else {"attention.clamp_kqv": float(clip)})


MPT = GgufFamily(
    architecture="mpt",
    model_type="mpt",
    class_name="MptForCausalLM",
    read_config=_read_mpt,
    write_metadata=_mpt_metadata,
    layer={
        "norm_1": "attn_norm",
        "attn.Wqkv": "attn_qkv",
        "attn.out_proj": "attn_output",
        "norm_2": "ffn_norm",
        "ffn.up_proj": "ffn_up",
        "ffn.down_proj": "ffn_down",
    },
    sizes=_sizes("d_model"),
    top={"transformer.wte": "token_embd", "transformer.norm_f": "output_norm", "lm_head": "output"},
    decoder="transformer",
    layers="blocks",
)
