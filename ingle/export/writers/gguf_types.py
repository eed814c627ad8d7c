"""Types of GGUF weights: the values of ``--type`` and their formats."""

from __future__ import annotations

import torch

from ingle.config.base import BaseConfig, base_section, why_not_quantized
from ingle.config.ggml import GgmlBase, MixBase
from ingle.errors import ConfigError
from ingle.evaluation.format_survey import safetensors_base
from ingle.gguf.mixes import ALIASES, FILE_TYPES
from ingle.quant import make_format
from ingle.quant.format import PLAIN, Format
from ingle.wording import nearest

#: ``--type`` of a file in which every tensor keeps its format; merged tensors are rounded to it again.
AS_TRAINED = "as-trained"


def choose_type(name: str | None, base: BaseConfig, *, from_gguf: bool = False) -> str:
    """Returns the type of a GGUF file.

    Args:
        name: ``--type`` as typed.  None selects the type of the base if GGUF supports it, and ``q8_0`` otherwise.
        base: Base section that the model was trained on.
        from_gguf: Whether the model was trained on the bytes of a GGUF file.

    Raises:
        ConfigError: GGUF has no such type, or does not support the format of the base.
    """
    keeps_format = from_gguf or is_gguf_format(base)
    if name is None:
        if isinstance(base, MixBase) and not from_gguf:
            return base.format
        return AS_TRAINED if keeps_format else "q8_0"
    chosen = ALIASES.get(name.lower(), name.lower())
    if chosen == AS_TRAINED and not keeps_format and base.format != "none":
        raise ConfigError(
            f"GGUF does not support {base.format}, the format that this model was trained on.",
            where=f"--type {name}",
            fix="--type q8_0, or another type of llama.cpp",
        )
    known = (AS_TRAINED, *FILE_TYPES)
    if chosen not in known:
        reason = why_not_quantized(chosen)
        near = nearest(chosen, known, cutoff=0.5)
        fix = f"did you mean {near}?" if near else None
        if safetensors_base(chosen) is not None:
            fix = f"--to safetensors --type {chosen}"
        raise ConfigError(
            f"There is no GGUF type {name!r}." if reason is None else f"Weights cannot be quantized to {name}.",
            where=f"--type {name}",
            why=reason or f"types are {', '.join(known)}",
            fix=fix,
        )
    return chosen


def is_gguf_format(base: BaseConfig) -> bool:
    """Returns whether GGUF supports the format of a base."""
    return isinstance(base, GgmlBase | MixBase)


def target_of(type_name: str) -> Format | torch.dtype:
    """Returns the format or the plain data type of one of ggml's types."""
    if type_name in PLAIN:
        return PLAIN[type_name]
    format = make_format(base_section({"format": type_name}))
    assert format is not None, type_name
    return format
