"""The format of each module: one for all, or as a mix of llama.cpp says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ingle.config.base import BaseConfig, NoBase
from ingle.config.ggml import MixBase
from ingle.errors import QuantizationError
from ingle.gguf.architecture import ARCHITECTURES
from ingle.gguf.mixes import Mix
from ingle.gguf.names import TensorNames
from ingle.quant.format import GGUF_FORMATS, Format, make_format
from ingle.quant.plane import Scratch

#: From a module's name, out_features and in_features to its format; None where it stays as it is.
Formats = Callable[[str, int, int], Format | None]


def make_formats(base: BaseConfig, model: nn.Module) -> Formats | None:
    """What decides the format of each linear map of a model; None where all stay as they are.

    Args:
        base: The config section.
        model: Whose ``config`` names the architecture, for a mix.

    Raises:
        QuantizationError: The section is a mix, and llama.cpp's rules for the architecture are not known.
    """
    if isinstance(base, NoBase):
        return None
    if not isinstance(base, MixBase):
        format = make_format(base)
        return lambda name, out_features, in_features: format
    config: Any = model.config
    architecture = ARCHITECTURES.get(getattr(config, "model_type", ""))
    if architecture is None:
        raise QuantizationError(
            f"llama.cpp's rules of {base.format} for this architecture are not known.",
            where="base.format",
            why=f"model_type is {getattr(config, 'model_type', None)!r}; known are {', '.join(ARCHITECTURES)}",
            fix=f"--base.format={base.format[:4]}, the format that most of the mix is held in",
        )
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    names = TensorNames(architecture, config.num_attention_heads, num_kv_heads)
    mix = Mix(
        base.format,
        architecture,
        config.num_hidden_layers,
        config.num_attention_heads,
        num_kv_heads,
        tied=bool(config.tie_word_embeddings),
    )
    make = GgufFormats()

    def choose(name: str, out_features: int, in_features: int) -> Format | None:
        weight = names.to_gguf(f"{name}.weight") or f"{name}.weight"
        return make(mix.tensor_type(weight, (out_features, in_features)))

    return choose


class GgufFormats:
    """Formats by ggml's name of the type; all of them decode into one scratch."""

    def __init__(self) -> None:
        scratch = Scratch()
        self._made = {member.__name__.lower(): member(scratch=scratch) for member in GGUF_FORMATS}

    def __call__(self, type_name: str) -> Format | None:
        """The format of a type; None for plain numbers and for types that Ingle does not hold packed."""
        return self._made.get(type_name)
