"""llama.cpp's file types: which tensor of a model gets which type.

A file type has a type for most matrices, and wider ones for those that lose most by it.  A matrix whose rows are not
whole blocks gets another type, and norms and biases stay as they are.

Source: llama.cpp's ``src/llama-quant.cpp`` (``llama_tensor_get_type_impl``, ``tensor_type_fallback``,
``tensor_allows_quantization``), for models without experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import block_of
from ingle.gguf.names import names_of

#: File types by name, with the type that most of their matrices have.
FILE_TYPES = {
    "f32": "f32",
    "f16": "f16",
    "bf16": "bf16",
    "q4_0": "q4_0",
    "q4_1": "q4_1",
    "q5_0": "q5_0",
    "q5_1": "q5_1",
    "q8_0": "q8_0",
    "q2_k": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "q6_k": "q6_k",
    "iq4_nl": "iq4_nl",
    "iq4_xs": "iq4_xs",
    "tq1_0": "tq1_0",
    "tq2_0": "tq2_0",
}

#: What llama.cpp's own quantizer takes these names for.
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

#: What stands in where rows are not whole blocks of 256.
_FALLBACKS = {
    "iq4_xs": "iq4_nl",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}

_LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Mix:
    """The rules of one file type for one model.

    Attributes:
        file_type: A name of ``FILE_TYPES``.
        architecture: llama.cpp's name of it.
        num_layers: Decoder layers.
        num_heads: Of queries.
        num_kv_heads: Of keys and values.
        tied: Whether the embedding is the head too.
        has_imatrix: Whether weights are packed with an importance matrix.
    """

    file_type: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    tied: bool
    has_imatrix: bool = False

    def __post_init__(self) -> None:
        if self.file_type not in FILE_TYPES:
            raise GgufError(
                f"There is no file type {self.file_type!r} that Ingle can write.", why=f"known: {', '.join(FILE_TYPES)}"
            )

    def tensor_type(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of a tensor; norms, biases and routers are float32.

        Args:
            name: GGUF's.
            shape: Outermost size first.
        """
        if not is_quantized(name, shape):
            return "f32"
        chosen = FILE_TYPES[self.file_type]
        if block_of(chosen)[0] == 1:
            return chosen
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            chosen = self._head(chosen, shape[-1])
        elif name == "token_embd.weight":
            chosen = "q4_k" if self.file_type in ("tq1_0", "tq2_0") else chosen
        elif ".attn_v.weight" in name:
            chosen = self._values(chosen, self._layer(name))
        elif ".ffn_down" in name:
            chosen = self._down(chosen, self._layer(name))
        elif ".attn_output.weight" in name:
            chosen = {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(self.file_type, chosen)
        return _fit(chosen, shape[-1])

    def _head(self, chosen: str, num_columns: int) -> str:
        if num_columns % block_of(chosen)[0]:
            return "q8_0"
        return chosen if chosen == "q8_0" else "q6_k"

    def _values(self, chosen: str, layer: int) -> str:
        shared = self.num_heads // self.num_kv_heads >= 4
        match self.file_type:
            case "q2_k":
                chosen = "q4_k" if shared else "q3_k"
            case "q3_k_m":
                chosen = "q5_k" if layer < 2 else "q4_k"
            case "q3_k_l":
                chosen = "q5_k"
            case "q4_k_m" | "q5_k_m" if self._gets_more(layer):
                chosen = "q6_k"
            case "q4_k_s" if layer < 4:
                chosen = "q5_k"
            case "iq4_nl" | "iq4_xs" if shared:
                chosen = "q5_k"
        # What llama.cpp takes for Llama-2-70B: its values are an eighth of its queries.
        is_70b = self.num_layers == 80 and (
            self.architecture == "qwen2" or (self.architecture == "llama" and self.num_heads != self.num_kv_heads)
        )
        return "q5_k" if is_70b and chosen in ("q3_k", "q4_k") else chosen

    def _down(self, chosen: str, layer: int) -> str:
        early = layer < self.num_layers // 8
        match self.file_type:
            case "q2_k":
                return "q3_k"
            case "q3_k_m":
                return "q5_k" if layer < self.num_layers // 16 else "q4_k"
            case "q3_k_l":
                return "q5_k"
            case "q4_k_m" | "q5_k_m" if self._gets_more(layer):
                return "q6_k"
            case "q4_k_s" if early:
                return "q5_k"
            case "iq4_nl" | "iq4_xs" if early and not self.has_imatrix:
                return "q5_k"
            case "q4_0" | "q5_0" if early and self.has_imatrix:
                return {"q4_0": "q4_1", "q5_0": "q5_1"}[self.file_type]
        return chosen

    def _gets_more(self, layer: int) -> bool:
        """The first eighth, the last eighth, and every third layer between."""
        eighth = self.num_layers // 8
        return layer < eighth or layer >= 7 * self.num_layers // 8 or (layer - eighth) % 3 == 2

    def _layer(self, name: str) -> int:
        match = _LAYER.match(name)
        assert match is not None, name
        return int(match[1])


def mix_of(file_type: str, metadata: dict[str, Any], *, tied: bool, has_imatrix: bool = False) -> Mix:
    """The rules of a file type for the model that GGUF metadata describe.

    Raises:
        GgufError: When the file type or the architecture is not known.
    """
    names = names_of(metadata)
    return Mix(
        file_type,
        names.architecture,
        int(metadata[f"{names.architecture}.block_count"]),
        names.num_heads,
        names.num_kv_heads,
        tied,
        has_imatrix,
    )


def is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp's quantizer touches a tensor: matrices that are no norms and no routers."""
    # ggml counts dimensions without the outer ones that are 1.
    matrix = any(size > 1 for size in shape[:-1])
    return matrix and name.endswith("weight") and "_norm.weight" not in name and "ffn_gate_inp.weight" not in name


def file_type_number(file_type: str) -> int:
    """What ``general.file_type`` is for a file type."""
    from gguf.constants import LlamaFileType

    prefix = "ALL" if file_type == "f32" else "MOSTLY"
    return int(LlamaFileType[f"{prefix}_{file_type.upper()}"])


def _fit(chosen: str, num_columns: int) -> str:
    if num_columns % block_of(chosen)[0] == 0:
        return chosen
    narrow = _FALLBACKS.get(chosen, chosen)
    return narrow if num_columns % block_of(narrow)[0] == 0 else "f16"
