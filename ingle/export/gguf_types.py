"""What a GGUF file's weights may be held in: the names of ``--type``, and what they mean."""

from __future__ import annotations

import torch

from ingle.config.base import BaseConfig, base_section, why_not_packed
from ingle.config.ggml import GgmlBase
from ingle.config.mixes import MixBase
from ingle.errors import ConfigError
from ingle.gguf.mixes import ALIASES, FILE_TYPES
from ingle.quant.format import PLAIN, Format, make_format

#: ``--type`` of a file in which every tensor keeps the format it was trained in.
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
            f"GGUF cannot hold {base.format}, which this model was trained on.",
            where=f"--type {name}",
            fix="--type q8_0, or another type of llama.cpp's",
        )
    if chosen not in (AS_TRAINED, *FILE_TYPES):
        raise ConfigError(
            f"no file can be written in {name}.",
            where=f"--type {name}",
            why=why_not_packed(chosen),
            fix=f"one of {', '.join(FILE_TYPES)}, {AS_TRAINED}",
        )
    return chosen


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
