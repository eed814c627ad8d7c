"""Implements llama.cpp's file types: rules that choose the type of each tensor of a model.

A file type has one type for most matrices and wider ones for sensitive matrices. A matrix whose rows are not a multiple
of the block size gets another type. Norms and biases stay float32.

Source: llama.cpp's ``src/llama-quant.cpp`` (``llama_tensor_get_type_impl``, ``tensor_type_fallback``,
``tensor_allows_quantization``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ingle.config.base import format_name
from ingle.config.ggml import ENCODED
from ingle.errors import GgufError
from ingle.gguf.container import block_of
from ingle.gguf.families import family_of_config, family_of_metadata

#: The type of most matrices by file type.
FILE_TYPES = {
    **{name: name for name in ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k")},
    **{f"{name}_{size}": name for name, sizes in (("q3_k", "sml"), ("q4_k", "sm"), ("q5_k", "sm")) for size in sizes},
    **{name: name for name in ("q6_k", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0")},
}
#: Short names that llama.cpp's quantizer accepts.
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

#: Types for matrices whose rows are not a multiple of the block size.
_FALLBACKS = {format_name(section): section.fallback for section in ENCODED if section.fallback is not None}
#: Parts of the names of tensors that llama.cpp never quantizes.
_NEVER_QUANTIZED = (
    *("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d", "shortconv.conv.weight", "per_layer_model_proj"),
    *("altup", "laurel", "position_embd", "token_types", "attn_rel_b"),
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
#: Value projections, and projections that contain one.
_VALUES = (".attn_v.weight", ".attn_qkv.weight", ".attn_kv_b.weight")
#: Types of the output projection of attention by file type; the second for models with eight experts.
_OUTPUTS = {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}
_OUTPUTS_OF_EIGHT = dict.fromkeys(("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs"), "q5_k")
_LAYER = re.compile(r"^(?:enc\.|dec\.)?blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Mix:
    """The rules of one file type for one model.

    Attributes:
        file_type: A key of ``FILE_TYPES``.
        architecture: llama.cpp's name of the architecture.
        num_layers: Number of decoder layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads of the first layer; 0 if it has no attention.
        tied: Whether the embedding is also the output head.
        has_imatrix: Whether weights are quantized with an importance matrix.
        num_experts: Number of experts; 0 for a model without them.
        value_layers: Layers with a value projection; empty if all have one.
        down_layers: Layers with a feed-forward network; empty if all have one.

    Raises:
        GgufError: The file type is unknown.
    """

    file_type: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    tied: bool
    has_imatrix: bool = False
    num_experts: int = 0
    value_layers: tuple[int, ...] = ()
    down_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.file_type not in FILE_TYPES:
            raise GgufError(
                f"Ingle cannot write the file type {self.file_type!r}.", why=f"supported are {', '.join(FILE_TYPES)}"
            )

    def tensor_type(self, name: str, shape: tuple[int, ...]) -> str:
        """Returns the type of a tensor; norms, biases and routers are float32.

        Args:
            name: The name in the GGUF file.
            shape: Outermost size first.
        """
        if not is_quantized(name, shape):
            return "f32"
        chosen = FILE_TYPES[self.file_type]
        if block_of(chosen)[0] == 1:
            return chosen
        if name == "output.weight" or (self.tied and name in _EMBEDDINGS):
            chosen = self._head(chosen, shape[-1])
        elif name in _EMBEDDINGS:
            chosen = "q4_k" if self.file_type in ("tq1_0", "tq2_0") else chosen
        elif any(part in name for part in _VALUES):
            chosen = self._attn_v(chosen, self._layer(name))
        elif ".attn_k.weight" in name:
            chosen = "q8_0" if self.num_experts == 8 else chosen
        elif ".ffn_down" in name:
            chosen = self._ffn_down(chosen, self._layer(name))
        elif ".attn_output.weight" in name:
            chosen = (_OUTPUTS_OF_EIGHT if self.num_experts == 8 else _OUTPUTS).get(self.file_type, chosen)
        return _fit(chosen, shape[-1])

    def _head(self, chosen: str, num_columns: int) -> str:
        if num_columns % block_of(chosen)[0]:
            return "q8_0"
        return chosen if chosen == "q8_0" else "q6_k"

    def _attn_v(self, chosen: str, layer: int) -> str:
        if self.num_experts == 8:
            return "q8_0"
        shared = self.num_kv_heads > 0 and self.num_heads // self.num_kv_heads >= 4
        number, count = layer, self.num_layers
        if self.value_layers:
            number, count = self.value_layers.index(layer), len(self.value_layers)
        match self.file_type:
            case "q2_k":
                chosen = "q4_k" if shared else "q3_k"
            case "q3_k_m":
                chosen = "q5_k" if number < 2 else "q4_k"
            case "q3_k_l":
                chosen = "q5_k"
            case "q4_k_m" | "q5_k_m" if _gets_more(number, count):
                chosen = "q6_k"
            case "q4_k_s" if number < 4:
                chosen = "q5_k"
            case "iq4_nl" | "iq4_xs" if shared:
                chosen = "q5_k"
        # llama.cpp's test for Llama-2-70B, whose value projection has an eighth of the size of the query projection.
        is_70b = self.num_layers == 80 and (
            self.architecture == "qwen2" or (self.architecture == "llama" and self.num_heads != self.num_kv_heads)
        )
        return "q5_k" if is_70b and chosen in ("q3_k", "q4_k") else chosen

    def _ffn_down(self, chosen: str, layer: int) -> str:
        if self.down_layers and self.num_experts < 2:  # llama.cpp counts networks, but layers of models with experts
            layer = self.down_layers.index(layer)
        early = layer < self.num_layers // 8
        match self.file_type:
            case "q2_k":
                return "q3_k"
            case "q3_k_m":
                return "q5_k" if layer < self.num_layers // 16 else "q4_k"
            case "q3_k_l":
                return "q5_k"
            case "q4_k_m" | "q5_k_m" if _gets_more(layer, self.num_layers):
                return "q6_k"
            case "q4_k_s" if early:
                return "q5_k"
            case "iq4_nl" | "iq4_xs" if early and not self.has_imatrix:
                return "q5_k"
            case "q4_0" | "q5_0" if early and self.has_imatrix:
                return {"q4_0": "q4_1", "q5_0": "q5_1"}[self.file_type]
        return chosen

    def _layer(self, name: str) -> int:
        match = _LAYER.match(name)
        assert match is not None, name
        return int(match[1])


def mix_of(file_type: str, metadata: Mapping[str, Any], *, tied: bool, has_imatrix: bool = False) -> Mix:
    """Returns the rules of a file type for the model that GGUF metadata describe.

    Raises:
        GgufError: The file type or the architecture is unknown.
    """
    architecture = family_of_metadata(metadata).architecture

    def value(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}", 0)

    kv_heads, widths = value("attention.head_count_kv"), value("feed_forward_length")
    is_list = isinstance(kv_heads, list)  # by layer, 0 for those without attention
    return Mix(
        file_type,
        architecture,
        int(value("block_count")),
        int(value("attention.head_count")),
        int(kv_heads[0] if is_list else kv_heads),
        tied,
        has_imatrix,
        int(value("expert_count")),
        _nonzero(kv_heads),
        _nonzero(widths),
    )


def _nonzero(counts: Any) -> tuple[int, ...]:
    """Returns the layers with a number above 0; none if the number is the same for all layers."""
    return tuple(layer for layer, count in enumerate(counts) if count) if isinstance(counts, list) else ()


def mix_of_config(file_type: str, config: Mapping[str, Any], tensors: Iterable[str] = ()) -> Mix:
    """Returns the rules of a file type for a model that is held in its types, whether GGUF can describe it or not.

    Args:
        file_type: A key of ``FILE_TYPES``.
        config: The content of ``config.json``.
        tensors: Names of the model's tensors; without them every layer is assumed to have a value projection.

    Raises:
        GgufError: The file type or the architecture is unknown.
    """
    heads = int(_first(config, "num_attention_heads", "n_head", "n_heads", "num_heads") or 1)
    layers = int(_first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    family, names = family_of_config(config), list(tensors)
    found, down = _layers_with(names, _VALUES), _layers_with(names, (".ffn_down.",))
    experts = int(_first(config, "num_local_experts", "num_experts", "n_routed_experts")) if family.has_experts else 0
    return Mix(
        file_type,
        family.architecture,
        layers or len(config["layers_block_type"]),
        heads,
        int(config.get("num_key_value_heads") or heads) if not found or 0 in found else 0,
        bool(config.get("tie_word_embeddings")),
        num_experts=experts,
        value_layers=found,
        down_layers=down,
    )


def _layers_with(names: Iterable[str], parts: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the layers with a tensor whose name has one of the parts."""
    found = {int(match[1]) for name in names if any(each in name for each in parts) and (match := _LAYER.match(name))}
    return tuple(sorted(found))


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key)), 0)


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether llama.cpp quantizes a tensor: all matrices except norms and routers."""
    # ggml does not count outer dimensions of size 1.
    matrix = any(size > 1 for size in shape[:-1])
    return matrix and name.endswith("weight") and not any(part in name for part in _NEVER_QUANTIZED)


def file_type_number(file_type: str) -> int:
    """Returns the value of ``general.file_type`` for a file type."""
    from gguf.constants import LlamaFileType

    prefix = "ALL" if file_type == "f32" else "MOSTLY"
    return int(LlamaFileType[f"{prefix}_{file_type.upper()}"])


def _gets_more(layer: int, num_layers: int) -> bool:
    """Returns whether a layer is in the first eighth, in the last eighth, or every third in between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _fit(chosen: str, num_columns: int) -> str:
    if num_columns % block_of(chosen)[0] == 0:
        return chosen
    fallback = _FALLBACKS.get(chosen, chosen)
    return fallback if num_columns % block_of(fallback)[0] == 0 else "f16"
