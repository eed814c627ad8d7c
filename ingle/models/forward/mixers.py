"""Finds the modules of an architecture in which tokens interact, from their code alone.

A module mixes tokens if its ``forward`` takes a cache or a mask. The rule needs no weights. It is a proposal:
:func:`ingle.models.verify` compares packed documents with single ones.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ingle.models.text_part import is_wrapper, text_decoder

#: How a module mixes tokens. ``interface``: by attention from transformers' registry. ``sparse``: so, with another
#: mixer inside that chooses or changes the keys. ``attention``: by attention of its own. ``state``: by anything else,
#: such as a recurrence or a convolution. ``positions``: it counts the tokens of a row.
Mixing = Literal["interface", "sparse", "attention", "state", "positions"]

#: A class of modules; for mypy those cannot be hashed.
Class = Any

CACHES = frozenset(
    [
        "past_key_values",
        "past_key_value",
        "cache_params",
        "layer_past",
        "past",
        "state",
        "cache",
        "past_states",
        "past_buckets_states",
        "mems",
    ]
)
MASKS = frozenset(
    ["attention_mask", "mask", "layer_mask", "causal_mask", "attn_mask", "attn_mask_h", "conv_mask", "padding_mask"]
)  # fmt: skip
_OTHERS = frozenset(("alibi", "seq_idx"))

#: Modules that take masks or caches only to pass them on.
_CONTAINERS = (GradientCheckpointingLayer, PreTrainedModel, nn.ModuleList, nn.Embedding)


def find_mixers(model: PreTrainedModel) -> dict[str, Mixing]:
    """Returns the names of the modules in which tokens interact, and how."""
    towers = _towers(model)
    named = [(name, module) for name, module in model.named_modules() if name and not name.startswith(towers)]
    candidates = {name for name, module in named if _takes_mask_or_cache(module)}
    found: dict[str, Mixing] = {}
    for name, module in named:
        if name not in candidates or any(name.startswith(f"{other}.") for other in found):
            continue
        inner = any(other.startswith(f"{name}.") for other in candidates)
        if "ALL_ATTENTION_FUNCTIONS" in source(original_class(module)):
            found[name] = "sparse" if inner else "interface"
        elif not inner:
            parts = (source(original_class(part)).lower() for part in module.modules())
            found[name] = "attention" if any("softmax" in part for part in parts) else "state"
    if "position_ids" not in parameters(original_class(base_of(model))) | parameters(original_class(model)):
        found |= {name: "positions" for name, module in named if _counts_tokens(module)}
    return found


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model without its output layer; some architectures name it otherwise than they declare."""
    if is_wrapper(model.config):
        return text_decoder(model)
    base: nn.Module = model.base_model
    children = [base] if base is not model else list(model.children())
    return next((child for child in children if isinstance(child, PreTrainedModel)), model)


def original_class(module: nn.Module) -> Class:
    """Returns the class of a module before it was dealt."""
    return getattr(type(module), "original", type(module))


@functools.cache
def parameters(cls: Class) -> frozenset[str]:
    """Returns the names of the parameters of ``forward``."""
    return frozenset(inspect.signature(cls.forward).parameters)


@functools.cache
def source(cls: Class) -> str:
    """Returns the source of a class; empty if there is none."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns how the names of modules begin that encode images or sound, which no text passes through."""
    sections = {type(getattr(model.config, key, None)) for key in ("vision_config", "audio_config")} - {type(None)}
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel))
    return tuple(f"{name}." for name, module in modules if type(module.config) in sections)


def _takes_mask_or_cache(module: nn.Module) -> bool:
    cls = original_class(module)
    own = cls.__module__.startswith(("transformers.models", "transformers_modules"))
    return own and not issubclass(cls, _CONTAINERS) and bool(parameters(cls) & (CACHES | MASKS | _OTHERS))


def _counts_tokens(module: nn.Module) -> bool:
    cls = original_class(module)
    own = cls is not nn.Embedding and "forward" in vars(cls)
    return own and "Position" in cls.__name__ and "Embedding" in cls.__name__
