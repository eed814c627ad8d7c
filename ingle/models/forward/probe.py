"""Builds probes: copies of models in which effects of the text length appear within a few tokens.

Windows of 4,096 tokens, or positions that change beyond 131,072, cannot be tested at every load. A probe has the same
architecture and config, with these lengths scaled down. It shares its weights with the model, so it needs no memory,
and has only enough layers to contain one of every kind. Effects of the length are exaggerated to make errors visible:
rotary positions turn faster and are stretched more.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ingle.models.forward.hidden_states import computed_in, device_of
from ingle.models.forward.layers import find_layers
from ingle.models.forward.layout import boundaries_of, layout_of
from ingle.models.forward.rotary_by_length import rope_sections, rope_types
from ingle.models.kinds import task_of
from ingle.models.loading.meta_device import build, compute_rest
from ingle.models.text_part import text_config
from ingle.parallel import is_unit

#: Keys of a config that name a length.
_ORIGINAL = "original_max_position_embeddings"
_LENGTHS = ("sliding_window", "window_size", "attention_chunk_size", _ORIGINAL)
_SHARDED_LENGTHS = (_ORIGINAL,)
_LONGEST = "max_position_embeddings"

#: Rope types that are the same for texts of all lengths.
_FIXED_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}

#: The smallest length in a probe, in tokens, and the difference between successive lengths.
_FIRST, _STEP = 4, 3

_NUM_IDS = 64

#: What an adapter adds to modules of an architecture; a probe computes without it.
_ADDED = ("virtual_tokens", "virtual_keys")


@dataclass(frozen=True, slots=True)
class Probe:
    """A model on which to compare packed documents with single ones; only its decoder works.

    Attributes:
        model: It shares weights with the original model.
        lengths: Lengths of the documents to compare, on both sides of every scaled length.
        num_ids: Size of its vocabulary.
        described: The scaled lengths, in the config and in the probe.
    """

    model: PreTrainedModel
    lengths: tuple[int, ...]
    num_ids: int
    described: str


def make_probe(model: PreTrainedModel) -> Probe | None:
    """Returns a probe of a loaded model; None if its config names no length at which something changes."""
    # A sharded layer gathers its weights only as a whole, so that a probe cannot have layers with windows of its own.
    # The tiny copy that chose the layout had them.
    names = _SHARDED_LENGTHS if any(map(is_unit, model.modules())) else _LENGTHS
    lengths = _named_lengths(text_config(model.config), names)
    if not lengths:
        return None
    found = sorted({value for _, _, value in lengths})
    small = {value: _FIRST + _STEP * index for index, value in enumerate(found)}
    config = copy.deepcopy(model.config)
    for section, key, value in _named_lengths(text_config(config), names):
        if isinstance(section, dict):
            section[key] = small[value]
        else:
            setattr(section, key, small[value])
    _exaggerate(text_config(config))
    # The model's own code is needed again if the model was built from it.
    own_code = not type(model).__module__.startswith("transformers.")
    parts: Any = {"layout": layout_of(model), "boundaries": boundaries_of(model), "task": task_of(model)}
    probe = build(config, computed_in(model), trust_remote_code=own_code, **parts)
    _keep_one_of_each(probe)
    device = device_of(model)
    compute_rest(probe, device, [name for name, _ in probe.named_buffers()])
    embedding: Any = probe.get_input_embeddings()
    width: int = embedding.weight.shape[1]
    _share(probe, model)
    probe.set_input_embeddings(_small_embedding(width, device, computed_in(model)))
    over = [length + 1 for length in small.values()]
    named = {key: f"{key} of {value:,} scaled to {small[value]}" for _, key, value in lengths}
    return Probe(probe, (small[found[0]], *over, small[found[-1]] * 3), _NUM_IDS, ", ".join(named.values()))


def _named_lengths(config: PretrainedConfig, names: tuple[str, ...]) -> list[tuple[Any, str, int]]:
    """Returns the lengths in a config at which something changes: the object or dictionary, the key, the length."""
    changing = rope_types(config) - _FIXED_ROPE
    keys = [key for key in names if changing or key != _ORIGINAL]
    keys += [_LONGEST] if any("dynamic" in kind for kind in changing) else []
    found: list[tuple[Any, str, Any]] = [(config, key, _value(config, key)) for key in keys]
    for section in rope_sections(config):
        if str(section.get("rope_type")) not in _FIXED_ROPE:
            found += [(section, key, section.get(key)) for key in names]
    longest = getattr(config, _LONGEST, None) or float("inf")
    return [
        (owner, key, value)
        for owner, key, value in found
        if isinstance(value, int) and value > 0 and (value < longest or key in (_LONGEST, _ORIGINAL))
    ]


def _value(config: PretrainedConfig, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except RuntimeError:  # each layer has its own
        return None


def _exaggerate(config: PretrainedConfig) -> None:
    for section in rope_sections(config):
        if "rope_theta" in section:
            section["rope_theta"] = 10.0
        if str(section.get("rope_type")) in _FIXED_ROPE:
            continue
        if isinstance(section.get("factor"), int | float):
            section["factor"] = 64.0
        if isinstance(section.get("long_factor"), list):
            section["long_factor"] = [8.0 * factor for factor in section["long_factor"]]


def _keep_one_of_each(probe: PreTrainedModel) -> None:
    """Drops the layers after the first ones that cover every kind."""
    layers = find_layers(probe)
    if layers is None:
        return
    config = text_config(probe.config)
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    first = [list(kinds).index(kind) for kind in dict.fromkeys(kinds)]
    del layers[max([1, *first]) + 1 :]


def _share(probe: nn.Module, model: nn.Module) -> None:
    """Puts the model's own modules and parameters into a probe, quantized or not."""
    for name, child in list(probe.named_children()):
        original = getattr(model, name)
        inner = [name for name, _ in child.named_children()]
        theirs = [name for name, _ in original.named_children() if name not in _ADDED]
        # A fused layer has the submodules of the layer that it replaces, and a probe has only the first layers. What is
        # shared as a whole keeps its window.
        same = inner == (theirs[: len(inner)] if isinstance(child, nn.ModuleList) else theirs)
        if inner and same and not is_unit(original):
            _share(child, original)
        elif list(original.parameters()):
            setattr(probe, name, original)
    for name in probe._parameters:
        probe._parameters[name] = model._parameters[name]


def _small_embedding(width: int, device: torch.device, dtype: torch.dtype) -> nn.Embedding:
    """Returns small random vectors, so that the layers' contributions dominate the hidden states."""
    values = torch.randn(_NUM_IDS, width, generator=torch.Generator().manual_seed(0)) * 0.02
    embedding: nn.Embedding = nn.Embedding.from_pretrained(values.to(device, dtype))
    return embedding
