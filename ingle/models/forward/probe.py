"""A small stand-in for a model in which everything that depends on the length of a text happens within a few tokens.

Windows of 4,096 tokens and positions that change beyond 131,072 cannot be tried on a real model at every load.  A
probe is the same architecture from the same config, with these lengths scaled down to a few tokens.  It shares its
weights with the model, so it costs no memory, and it keeps only as many layers as it takes to have one of every kind.
What changes with the length is made strong enough to show: rotary positions turn fast, and stretch a lot.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ingle.models.forward.layers import find_layers
from ingle.models.forward.packed import computed_in
from ingle.models.forward.rotary_by_length import rope_sections, rope_types
from ingle.models.loading.architecture import build
from ingle.models.loading.computed import compute

#: Keys of a config that name a length; the last one counts where positions depend on it.
_ORIGINAL = "original_max_position_embeddings"
_LENGTHS = ("sliding_window", "window_size", "attention_chunk_size", _ORIGINAL)
_LONGEST = "max_position_embeddings"

#: Types of rotary positions that are the same for texts of all lengths.
_FIXED_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}

#: Tokens that the smallest length becomes, and by how much the next one is larger.
_FIRST, _STEP = 4, 3

_NUM_IDS = 64


@dataclass(frozen=True, slots=True)
class Probe:
    """A model to compare packed documents with single ones on; only its decoder is there.

    Attributes:
        model: It shares weights with the model it was made of.
        lengths: Of documents on both sides of every length that counts.
        num_ids: Size of its vocabulary.
        described: The lengths that count, as they are in the config and in the probe.
    """

    model: PreTrainedModel
    lengths: tuple[int, ...]
    num_ids: int
    described: str


def make_probe(model: PreTrainedModel) -> Probe | None:
    """A probe of a filled model; None where its config names no length at which something changes."""
    found = sorted({value for _, _, value in _named_lengths(model.config)})
    if not found:
        return None
    small = {value: _FIRST + _STEP * index for index, value in enumerate(found)}
    config = copy.deepcopy(model.config)
    for section, key, value in _named_lengths(config):
        _set(section, key, small[value])
    _exaggerate(config)
    # Code of the model's own is asked for again only where it is what made the model.
    own_code = not type(model).__module__.startswith("transformers.")
    probe = build(config, computed_in(model), trust_remote_code=own_code)
    _keep_one_of_each(probe)
    device = next(model.parameters()).device
    compute(probe, device, known={name for name, _ in probe.named_parameters()})
    embedding: Any = probe.get_input_embeddings()
    width: int = embedding.weight.shape[1]
    _share(probe, model)
    probe.set_input_embeddings(_quiet_embedding(width, device, computed_in(model)))
    over = [length + 1 for length in small.values()]
    named = {key: f"{key} of {value:,} taken as {small[value]}" for _, key, value in _named_lengths(model.config)}
    return Probe(probe, (small[found[0]], *over, small[found[-1]] * 3), _NUM_IDS, ", ".join(named.values()))


def _named_lengths(config: PretrainedConfig) -> list[tuple[Any, str, int]]:
    """Where a config names a length that changes something: the object or dictionary, the key, the length."""
    changing = rope_types(config) - _FIXED_ROPE
    keys = [key for key in _LENGTHS if changing or key != _ORIGINAL]
    keys += [_LONGEST] if any("dynamic" in kind for kind in changing) else []
    found: list[tuple[Any, str, Any]] = [(config, key, getattr(config, key, None)) for key in keys]
    for section in rope_sections(config):
        if str(section.get("rope_type")) not in _FIXED_ROPE:
            found += [(section, key, section.get(key)) for key in _LENGTHS]
    longest = getattr(config, _LONGEST, None) or float("inf")
    return [
        (place, key, value)
        for place, key, value in found
        if isinstance(value, int) and value > 0 and (value < longest or key in (_LONGEST, _ORIGINAL))
    ]


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


def _set(section: Any, key: str, value: int) -> None:
    if isinstance(section, dict):
        section[key] = value
    else:
        setattr(section, key, value)


def _keep_one_of_each(probe: PreTrainedModel) -> None:
    """Drops the layers after the first ones that show every kind."""
    layers = find_layers(probe)
    if layers is None:
        return
    config = probe.config
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    first = [list(kinds).index(kind) for kind in dict.fromkeys(kinds)]
    del layers[max([1, *first]) + 1 :]


def _share(probe: nn.Module, model: nn.Module) -> None:
    """Gives a probe the model's weights: whole modules that hold them, packed or not, or else their parameters."""
    for name, child in list(probe.named_children()):
        real = getattr(model, name)
        if type(child) is type(real) and list(child.children()):
            _share(child, real)
        elif list(real.parameters()):
            setattr(probe, name, real)
    for name in probe._parameters:
        probe._parameters[name] = model._parameters[name]


def _quiet_embedding(width: int, device: torch.device, dtype: torch.dtype) -> nn.Embedding:
    """Small random vectors: what the first layers add to them is then most of the answer."""
    values = torch.randn(_NUM_IDS, width, generator=torch.Generator().manual_seed(0)) * 0.02
    quiet: nn.Embedding = nn.Embedding.from_pretrained(values.to(device, dtype))
    return quiet
