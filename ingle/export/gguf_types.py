"""What a GGUF file's weights may be held in: the names of ``--type``, and what they mean."""

from __future__ import annotations

import torch

from ingle.config.base import BaseConfig, base_section, why_not_quantized
from ingle.config.ggml import GgmlBase
from ingle.config.mixes import MixBase
from ingle.errors import ConfigError
from ingle.evaluation.format_survey import safetensors_base
from ingle.gguf.mixes import ALIASES, FILE_TYPES
from ingle.quant.format import PLAIN, Format, make_format
from ingle.wording import nearest

#: ``--type`` of a file in which every tensor keeps its format; merged ones are rounded to it again.
AS_TRAINED = "as-trained"


def choose_type(name: str | None, base: BaseConfig, *, from_gguf: bool = False) -> str:
    """The type of the file.

    Args:
        name: ``--type`` as typed; None for what was trained on, where GGUF holds it, and else what loses least.
        base: What the model was trained on.
        from_gguf: It was trained on the bytes of a GGUF file.

    Raises:
        ConfigError: No GGUF file has this type, or the base is held in what GGUF does not hold.
    """
    if name is None and isinstance(base, MixBase) and not from_gguf:
        return base.format
    if name is None:
        return AS_TRAINED if from_gguf or holds(base) else "q8_0"
    chosen = ALIASES.get(name.lower(), name.lower())
    if chosen == AS_TRAINED and not (from_gguf or holds(base)) and base.format != "none":
        raise ConfigError(
            f"GGUF cannot hold {base.format}, the format that this model was trained on.",
            where=f"--type {name}",
            fix="--type q8_0, or another type of llama.cpp",
        )
    if chosen not in (AS_TRAINED, *FILE_TYPES):
        reason = why_not_quantized(chosen)
        known = (AS_TRAINED, *FILE_TYPES)
        near = nearest(chosen, known, cutoff=0.5)
        raise ConfigError(
            f"There is no GGUF type {name!r}." if reason is None else f"No weights can be packed in {name}.",
            where=f"--type {name}",
            why=reason or f"types are {', '.join(known)}",
            fix=_elsewhere(chosen) or (f"did you mean {near}?" if near else None),
        )
    return chosen


def _elsewhere(name: str) -> str | None:
    """What to type for a format that safetensors hold and GGUF does not."""
    return f"--to safetensors --type {name}" if safetensors_base(name) is not None else None


def holds(base: BaseConfig) -> bool:
    """Whether GGUF has the format that a base is held in."""
    return isinstance(base, GgmlBase | MixBase)


def target_of(type_name: str) -> Format | torch.dtype:
    """What a tensor of one of ggml's types is packed in, or the dtype of plain numbers."""
    if type_name in PLAIN:
        return PLAIN[type_name]
    format = make_format(base_section({"format": type_name}))
    assert format is not None, type_name
    return format
