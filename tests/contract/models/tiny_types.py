"""Small configs of every causal model type that the installed transformers has."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ingle.models.loading.small_config import Size, shrink

CAUSAL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
ENCODER_TYPES = tuple(
    sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys())
)
ENCODER_DECODER_TYPES = tuple(sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES))

_BERT = {"is_decoder": True}
_AXES = {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8]}
#: Settings of the small config: layers of each kind, and sizes that fit each other only in the defaults.
_SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "rembert", "megatron-bert", "camembert"), _BERT),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "data2vec-text", "ernie", "roformer", "roc_bert"), _BERT),
    **dict.fromkeys(("roberta-prelayernorm", "bert-generation"), _BERT),
    "xmod": {**_BERT, "default_language": "en_XX"},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "num_experts": 4,
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 2,
        "ple_num_heads": 4,
        "ple_embed_dim": 32,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {**_BERT, **_AXES},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    **{kind: {**_BERT, "attention_type": "original_full"} for kind in ("big_bird", "bigbird_pegasus")},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "ctrl": {"dff": 64},  # the kinks of more ReLUs are hit by rounding
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling_text": {"n_routed_experts": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
}


#: The same for encoders.
_ENCODER_SETTINGS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "esmc": {"vocab_size": 128},
    "modernbert": {"local_attention": 8},
    "perceiver": {
        **dict.fromkeys(("d_latents", "d_model", "qk_channels", "v_channels"), 32),
        "num_latents": 8,
        "num_self_attends_per_block": 1,
    },
    "reformer": _AXES,
    "xmod": {"default_language": "en_XX"},
}


#: The same for encoder-decoders.
_ENCODER_DECODER_SETTINGS: dict[str, dict[str, Any]] = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    **{kind: {"decoder_start_token_id": 0} for kind in ("t5", "mt5", "umt5", "longt5", "switch_transformers")},
}


#: What default configs lack: the layers of a wrapper, or sizes that fit each other.
_MISSING: dict[str, dict[str, Any]] = {
    "emu3": {"vocabulary_map": {"<image>": 5, "<|visual token 000000|>": 6}},
    "gemma4_assistant": {
        "text_config": {
            **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
            **dict.fromkeys(("num_hidden_layers", "num_kv_shared_layers"), 4),
        }
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 256,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
    },
}


def default_config(kind: str) -> PretrainedConfig:
    """The default config of a type, with what it lacks."""
    config: PretrainedConfig = CONFIG_MAPPING[kind](**_MISSING.get(kind, {}))
    return config


def small_config(kind: str) -> PretrainedConfig:
    """The default config of a causal type, shrunk."""
    return _small(kind, _SETTINGS)


def small_encoder_config(kind: str) -> PretrainedConfig:
    """The default config of an encoder, shrunk."""
    return _small(kind, _ENCODER_SETTINGS)


def small_encoder_decoder_config(kind: str) -> PretrainedConfig:
    """The default config of an encoder-decoder, shrunk."""
    return _small(kind, _ENCODER_DECODER_SETTINGS)


def _small(kind: str, changes: dict[str, dict[str, Any]]) -> PretrainedConfig:
    config = shrink(default_config(kind), Size(width=32, layers=4, vocab_size=128, positions=64))
    settings = changes.get(kind)
    if settings is None:
        return config
    described = config.to_dict()
    for key in ("transformers_version", "model_type", "architectures", "dtype"):
        described.pop(key, None)
    return type(config)(**{**described, **settings})
