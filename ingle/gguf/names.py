"""Maps the weights of transformers to the tensors of GGUF files.

llama.cpp's converter also changes two other things. For Llama (and Mistral, which has the same architecture in
llama.cpp) it interleaves the rows of the query and key projections, because llama.cpp rotates neighboring pairs and
transformers rotates halves. A block never crosses a row, so permuting quantized rows is exact. For Gemma it adds one to
the weights of norms.

Source: llama.cpp's ``convert_hf_to_gguf.py`` and the ``gguf`` package's ``tensor_mapping.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingle.errors import GgufError

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}

#: The modules in a layer of each of llama.cpp's architectures.
LAYERS = {
    "llama": _LAYER | _TWO_NORMS,
    "qwen2": _LAYER | _TWO_NORMS,
    "qwen3": _LAYER | _TWO_NORMS | _HEAD_NORMS,
    "gemma": _LAYER | _TWO_NORMS,
    "gemma2": _LAYER | _FOUR_NORMS,
    "gemma3": _LAYER | _FOUR_NORMS | _HEAD_NORMS,
}

#: Architectures for which llama.cpp always uses the embedding as the output head.
ALWAYS_TIED = ("gemma", "gemma2")

#: Tensor with the divisors of the rotary frequencies, which transformers stores in the config.
ROPE_FREQS = "rope_freqs.weight"

_HF = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_GGUF = re.compile(r"^blk\.(\d+)\.([a-z_]+)\.(weight|bias)$")


@dataclass(frozen=True)
class TensorNames:
    """The tensor names of a model in transformers and in GGUF.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads.

    Raises:
        GgufError: The architecture is not supported.
    """

    architecture: str
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        if self.architecture not in LAYERS:
            raise unsupported(self.architecture)

    def to_gguf(self, name: str) -> str | None:
        """Returns the GGUF name of a weight of transformers, or None if there is none."""
        if match := _HF.match(name):
            layer, module, kind = match.groups()
            part = LAYERS[self.architecture].get(module)
            return None if part is None else f"blk.{layer}.{part}.{kind}"
        module, _, kind = name.rpartition(".")
        if kind != "weight" or (module == "lm_head" and self.architecture in ALWAYS_TIED):
            return None
        return f"{_TOP[module]}.{kind}" if module in _TOP else None

    def to_hf(self, name: str) -> str | None:
        """Returns the transformers name of a GGUF tensor, or None if there is none (``rope_freqs.weight``)."""
        if match := _GGUF.match(name):
            layer, part, kind = match.groups()
            module = _inverse(LAYERS[self.architecture]).get(part)
            return None if module is None else f"model.layers.{layer}.{module}.{kind}"
        part, _, kind = name.rpartition(".")
        module = _inverse(_TOP).get(part)
        return None if module is None or kind != "weight" else f"{module}.{kind}"

    def permutation(self, name: str, num_rows: int) -> NDArray[np.int64] | None:
        """Returns the row of transformers for each row of a GGUF tensor, or None if rows keep their order.

        ``rows_gguf = rows_hf[permutation]`` and ``rows_hf = rows_gguf[argsort(permutation)]``.
        """
        match = _GGUF.match(name)
        if self.architecture != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
            return None
        num_heads = self.num_heads if match[2] == "attn_q" else self.num_kv_heads
        halves = np.arange(num_rows, dtype=np.int64).reshape(num_heads, 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)

    def offset(self, name: str) -> float:
        """Returns the number that GGUF files add to the values of a tensor."""
        return 1.0 if self.architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0


def names_of(metadata: dict[str, Any]) -> TensorNames:
    """Returns the tensor names of a model from the metadata of its GGUF file.

    Raises:
        GgufError: The architecture is not supported, or the numbers of heads are missing or invalid.
    """
    architecture = metadata.get("general.architecture", "")
    if not isinstance(architecture, str) or architecture not in LAYERS:
        raise unsupported(str(architecture)[:60])
    num_heads: Any = metadata.get(f"{architecture}.attention.head_count")
    num_kv_heads: Any = metadata.get(f"{architecture}.attention.head_count_kv", num_heads)
    if not (_is_count(num_heads) and _is_count(num_kv_heads)) or num_heads % num_kv_heads:
        raise GgufError(
            "The numbers of attention heads in the file are invalid.",
            where=f"{architecture}.attention.head_count",
            why=f"head_count is {str(num_heads)[:60]}, head_count_kv is {str(num_kv_heads)[:60]}; the first must be a "
            "positive integer and a multiple of the second",
        )
    return TensorNames(architecture, num_heads, num_kv_heads)


def unsupported(architecture: str) -> GgufError:
    """Returns the error for an unsupported architecture."""
    return GgufError(
        f"GGUF models of the architecture {architecture!r} are not supported.",
        why=f"supported are {', '.join(LAYERS)}",
        fix="use the model's safetensors release",
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}
