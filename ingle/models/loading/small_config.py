"""Shrinks the config of any architecture, so that a model of a few layers can be built in memory and computed.

Keys of sizes and counts follow conventions, so a table of patterns covers all architectures. A few architectures need
sizes that fit each other: see :data:`_RELATED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

#: Keys that keep their values.
_KEPT = re.compile(
    r"num_codebooks|num_channels|num_image|spatial_merge|temporal_patch|num_labels|num_nextn|num_mtp"
    r"|num_hidden_layers_per|^num_v_channels|^n_in$|buckets$|^acoustic_tokenizer_chunk_size$"
)
#: Patterns of keys, and a count, which is the largest (int), or a size as a share of the width (float), which is set
#: unless it is 0. The first match decides.
_SIZES: tuple[tuple[str, int | float], ...] = (
    (r"index_n_heads|index_num_heads", 16),  # fewer would give equal scores, whose order depends on the shape
    (r"qk_rope_head_dim|rope_head_dim|rotary_dim|rope_dim$", 1 / 8),
    (r"index_head_dim|index_dim|qk_nope_head_dim|v_head_dim|qk_head_dim|kv_channels|d_kv", 1 / 4),
    (r"linear_(key|value)_head_dim|mamba_(d_head|head_dim|headdim)", 1 / 4),
    (r"mamba_d_ssm", 2.0),
    (r"mamba_d_state|ssm_state_size|^state_size|mamba_state", 1 / 4),
    (r"head_dim|attention_head_size|d_head|hidden_size_per_head|head_size", 1 / 4),
    (r"moe_topk|experts_per_tok|top_?k$|num_selected_experts|num_experts_per|expert_top_k|moe_top_k|activated_exp", 2),
    (r"^(num|n)_(routed_|local_|moe_)?experts?$|num_routed_experts|num_experts$|zero_expert_num|n_experts", 4),
    (r"n_group$|num_expert_groups?$|expert_group", 2),
    (r"topk_group$|group_topk|num_groups_topk", 1),
    (r"index_topk|topk_limit", 16),
    (r"chunk_size|chunk_length", 16),
    (r"chunk_right_context", 8),  # a part of the chunk
    (r"sliding_window$|window_size$|sliding_window_size|local_window|attention_window", 8),
    (r"lora_rank|_rank$|lora_dim|low_rank|lowrank", 1 / 4),
    (r"mamba_dt_rank|time_step_rank", 1 / 8),
    (r"hidden_size_per_layer_input", 1 / 4),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"n_groups|mamba_n_?groups|mamba_num_groups", 2),
    (
        r"num_key_value_heads|num_kv_heads|kv_n_heads|n_kv_heads|n_head_kv|num_query_groups|multi_query_group_num"
        r"|linear_num_k(ey)?_heads|num_v_heads",
        2,
    ),
    (r"(attention_heads|^n_heads?$|^num_heads$|linear_num_value_heads)$", 4),
    (
        r"intermediate_size|inner_size|ffn_dim|ffn_hidden|^d_ff$|^n_inner$|^d_inner$|dim_ff|feed_forward|ff_dim"
        r"|hidden_dim_ff|block_ff_dim|ffn_size|mlp_hidden|latent_size",
        2.0,
    ),
    (r"hidden_size_global|adapter_input_size|adapter_out_dim|lru_width|^attention_hidden_size$|conv_dim_override", 1.0),
    (
        r"(^|_)(hidden_size|d_model|n_embd|embedding_size|embed_dim|hidden_dim|embedding_dim|hid_dim|emb_dim"
        r"|word_embed_proj_dim|dim)$|^width$|cross_attention_hidden_size|proj_dim|output_dim|projection_dim",
        1.0,
    ),
    (r"first_k_dense|num_dense_layers|n_dense|num_kv_shared_layers|num_hash_layers", 1),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"num_mel_bins", 16),
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
_ANY_LAYERS = re.compile(r"(layers?|num_hidden_layers|num_blocks|n_blocks|depth|num_hidden_groups)$")
_LAYER_KINDS = re.compile(r"^(layer_types|layers_block_type|attention_layers|block_types|mlp_layer_types|mlp_types)$")
_VOCABULARY = re.compile(r"vocab_size|vocab_pad|^n_tokens$|^vocab_length")
_TOKENS = re.compile(r"(token_id|_idx|token_index|_index)$")
_POSITIONS = re.compile(
    r"n_positions|n_ctx|max_position|max_seq_len|max_source|max_target|max_sequence|context_length|seq_length"
)
_NOT_PASSED = ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a small model.

    Attributes:
        width: Of the hidden states; a multiple of 32.
        layers: Layers to keep at least.
        vocab_size: Largest vocabulary; that of the config if None.
        positions: Longest text; that of the config if None.
    """

    width: int
    layers: int
    vocab_size: int | None = None
    positions: int | None = None


def shrink(config: PretrainedConfig, size: Size) -> PretrainedConfig:
    """Returns the config of a small model with the same type and options, and a layer of each kind.

    Args:
        config: Of any model of a published size.
        size: Of the small model.
    """
    settings = _shrink(config.to_dict(), size)
    for key in _NOT_PASSED:
        settings.pop(key, None)
    small = type(config)(**settings)
    small.architectures = config.architectures
    small._name_or_path = config._name_or_path
    return small


def _shrink(settings: Mapping[str, Any], size: Size) -> dict[str, Any]:
    total = next((settings[key] for key in _LAYERS if isinstance(settings.get(key), int)), None)
    kept = _kept_layers(settings, total, size.layers)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list | tuple) and kept is not None and len(value) == total:
            small[key] = [value[index] for index in kept]
            if "intermediate_size" in key:  # one for each layer
                small[key] = [_limited(key, each, size) for each in small[key]]
        elif key in _LAYERS and value == total and kept is not None:
            small[key] = len(kept)
        elif key == "per_layer_config" and isinstance(value, dict):
            places = {old: new for new, old in enumerate(kept or range(total or 0))}
            small[key] = {places[int(old)]: _shrink(each, size) for old, each in value.items() if int(old) in places}
        elif isinstance(value, dict):
            small[key] = _shrink(value, size)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = _limited(key, value, size)
        else:
            small[key] = value
    _cut_factors(settings, small)
    _fit_latent_attention(small)
    for related in _RELATED.get(str(settings.get("model_type")), ()):
        related(small, size.width)
    return small


def _kept_layers(settings: Mapping[str, Any], total: int | None, fewest: int) -> list[int] | None:
    """Returns the layers to keep, with one of each kind; None for all."""
    if total is None or total <= fewest:
        return None
    first: list[int] = []
    for key, value in settings.items():
        if _LAYER_KINDS.match(key) and isinstance(value, Sequence) and len(value) == total:
            first += [list(value).index(kind) for kind in dict.fromkeys(map(_plain, value)) if kind in value]
    kept = sorted(set(first))
    kept += [index for index in range(total) if index not in kept][: max(0, fewest - len(kept))]
    return sorted(kept)


def _plain(kind: Any) -> Any:
    return kind if isinstance(kind, str) else repr(kind)


def _limited(key: str, value: int, size: Size) -> int:
    if _VOCABULARY.search(key):
        return _smaller(value, size.vocab_size)
    if _TOKENS.search(key):
        return _smaller(value, None if size.vocab_size is None else size.vocab_size - 1)
    if _POSITIONS.search(key):
        return _smaller(value, size.positions)
    if _KEPT.search(key):
        return value
    for pattern, wanted in _SIZES:
        if re.search(pattern, key):
            if isinstance(wanted, int):
                return min(value, wanted)
            return int(wanted * size.width) if value else 0
    return min(value, size.layers) if _ANY_LAYERS.search(key) else value


def _smaller(value: int, limit: int | None) -> int:
    return value if limit is None else min(value, limit)


def _cut_factors(settings: Mapping[str, Any], small: dict[str, Any]) -> None:
    """Shortens the factors that rotary positions have for each pair of dimensions of a head."""
    old, new = (_head_dim(each) for each in (settings, small))
    if old is None or new is None:
        return
    for name in ("rope_parameters", "rope_scaling"):
        section = small.get(name)
        for part in (section, *section.values()) if isinstance(section, dict) else ():
            for key, factors in part.items() if isinstance(part, dict) else ():
                if key.endswith("_factor") and isinstance(factors, list):
                    rotated = part.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
                    if len(factors) == _num_pairs(old * rotated):
                        part[key] = factors[: _num_pairs(new * rotated)]
                elif key == "mrope_section":  # pairs of dimensions for each axis of positions
                    counts = [count * new // old for count in factors]
                    part[key] = [sum(factors) * new // old - sum(counts[1:]), *counts[1:]]


def _num_pairs(rotated: float) -> int:
    return (int(rotated) + 1) // 2


def _head_dim(settings: Mapping[str, Any]) -> int | None:
    if isinstance(found := settings.get("head_dim"), int):
        return found
    width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def _fit_latent_attention(small: dict[str, Any]) -> None:
    """All heads of latent attention have keys, and ``head_dim`` names the rotated part."""
    if not isinstance(small.get("kv_lora_rank"), int):
        return
    if "num_key_value_heads" in small:
        small["num_key_value_heads"] = small.get("num_attention_heads", 4)
    if isinstance(small.get("qk_head_dim"), int) and "qk_nope_head_dim" in small:
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if isinstance(small.get("head_dim"), int) and "qk_rope_head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]


def _inner_heads(settings: dict[str, Any], width: int) -> None:
    settings |= {"num_heads": 8, "head_dim": width // 4}


def _zamba(settings: dict[str, Any], width: int) -> None:
    settings |= {"attention_hidden_size": 2 * width, "attention_head_dim": width // 2, "num_key_value_heads": 4}


def _zamba2(settings: dict[str, Any], width: int) -> None:
    _zamba(settings, width)
    kinds = settings.get("layers_block_type") or ()
    settings |= {"mamba_headdim": width // 4, "kv_channels": width // 4, "n_mamba_heads": 8}
    settings["hybrid_layer_ids"] = [index for index, kind in enumerate(kinds) if kind == "hybrid"]


def _longcat(settings: dict[str, Any], width: int) -> None:
    settings |= {"head_dim": width // 8, "qk_head_dim": 3 * width // 8}


def _quarter_heads(settings: dict[str, Any], width: int) -> None:
    settings["head_dim"] = width // 4


def _dots3_note(settings: dict[str, Any], width: int) -> None:
    settings["head_dim"] = settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"]


def _all_heads_have_keys(settings: dict[str, Any], width: int) -> None:
    settings["num_key_value_heads"] = settings.get("num_attention_heads")


def _bottleneck(settings: dict[str, Any], width: int) -> None:
    settings |= {"intra_bottleneck_size": width, "hidden_size": 2 * width}  # the head has the columns that differ


def _half_heads(settings: dict[str, Any], width: int) -> None:
    settings["head_dim"] = width // 2


def _cross_layers(settings: dict[str, Any], width: int) -> None:
    layers = settings["num_hidden_layers"]
    settings["cross_attention_layers"] = [each for each in settings["cross_attention_layers"] if each < layers]


def _shared_keys(settings: dict[str, Any], width: int) -> None:
    """Of each kind, a layer computes keys and values, and a later one uses them."""
    if settings.get("num_kv_shared_layers"):
        kinds, layers = list(dict.fromkeys(settings["layer_types"])), settings["num_hidden_layers"]
        settings["layer_types"] = [kinds[index % len(kinds)] for index in range(layers)]
        settings["num_kv_shared_layers"] = max(0, min(len(kinds), layers - len(kinds)))


def _two_blocks(settings: dict[str, Any], width: int) -> None:
    settings |= {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1}


#: Towers of sound whose files have queries, keys and values in one tensor, which is read in thirds.
_FUSED_IN_THIRDS = (
    "nemotron3_5_transcribe_asr_audio",
    "nemotron3_5_transcribe_word_timestamp",
    "nemotron3_diarization_audio",
)
#: Sizes that must fit each other, by model type.
_RELATED: dict[str, tuple[Callable[[dict[str, Any], int], None], ...]] = {
    "mamba2": (_inner_heads,),
    "zamba": (_zamba,),
    "zamba2": (_zamba2,),
    "longcat_flash": (_longcat,),
    "dots3_note_text": (_dots3_note,),
    "esmc": (_all_heads_have_keys,),
    **dict.fromkeys(_FUSED_IN_THIRDS, (_all_heads_have_keys,)),
    "funnel": (_two_blocks,),
    "mllama_text_model": (_cross_layers,),
    "gemma3n_text": (_shared_keys,),
    "gemma4_text": (_shared_keys,),
    "hunyuan_v1_dense": (_quarter_heads,),
    "hunyuan_v1_moe": (_quarter_heads,),
    "mobilebert": (_bottleneck,),
    "neomme": (_half_heads,),
    "ministral": (_quarter_heads,),
    "nemotron": (_quarter_heads,),
}
