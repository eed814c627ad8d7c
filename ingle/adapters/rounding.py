"""Training through the rounding of a merge: layers multiply with what they will be merged into.

Packing costs far more than a decode, so it is done once an optimizer step and the packed result is kept; every
micro-batch of the step decodes it.  Whether a step does so is a function of the step alone, and what is kept a
function of A, B and the base: a run that goes on after a stop computes what it would have computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ingle.adapters.adapted import lora_modules
from ingle.adapters.lora import LoraLinear, Merged, features
from ingle.adapters.merging import can_fold, merged_planes, merged_weight
from ingle.config.adapter import AdapterConfig, LoraAdapter, QaLoraAdapter
from ingle.config.base import FormatName, base_section
from ingle.errors import AdapterError
from ingle.quant import make_formats
from ingle.quant.format import Format
from ingle.quant.linear import QuantLinear


class Rounding:
    """Keeps the merged weights of a run's layers up to date in those steps that train through their rounding.

    Args:
        model: A model with its adapter attached and its weights in place.
        adapter: What it was attached with.
        num_steps: Of the run.

    Attributes:
        first_step: The first step (1-based) that trains through the rounding; None when none does.
        seconds: Time spent on packing so far.

    Raises:
        AdapterError: A layer is not packed and no format is named.
        QuantizationError: A layer does not fit the format.
    """

    def __init__(self, model: nn.Module, adapter: AdapterConfig, num_steps: int) -> None:
        self.first_step: int | None = None
        self.seconds = 0.0
        self._model = model
        self._formats: dict[str, Format] = {}
        if isinstance(adapter, QaLoraAdapter) and adapter.train_rounding:
            self.first_step = 1
            self._formats = resolve_formats(model, None)
        elif isinstance(adapter, LoraAdapter) and adapter.merge_aware is not None:
            self.first_step = adapter.merge_aware.first_step(num_steps)
            self._formats = resolve_formats(model, adapter.merge_aware.format)
            _rehearse(model, self._formats)

    def prepare(self, step: int) -> None:
        """Readies the layers for a step; also to be called after the last one, with the next step's number."""
        if self.first_step is None or step < self.first_step:
            return
        began = time.monotonic()
        round_layers(self._model, self._formats)
        self.seconds += time.monotonic() - began

    def to_dict(self) -> dict[str, Any] | None:
        """What was done, as plain data: ``formats``, ``first_step`` and ``packing_s``; None where nothing was."""
        if self.first_step is None:
            return None
        formats = sorted({format.name for format in self._formats.values()})
        return {"formats": formats, "first_step": self.first_step, "packing_s": self.seconds}


def resolve_formats(model: nn.Module, name: FormatName | None) -> dict[str, Format]:
    """The format that each adapted layer is merged into: the one named, or its own.

    Raises:
        AdapterError: A layer is not packed and no format is named.
    """
    choose = None if name is None else make_formats(base_section(name), model)
    formats: dict[str, Format] = {}
    for path, layer in lora_modules(model).items():
        own = layer.base.format if isinstance(layer.base, QuantLinear) else None
        named = None if choose is None else choose(path, *features(layer.base))
        # The base's own options (the block size of nf4) stay when it is named; then untouched bytes can be copied.
        format = own if named is None or (own is not None and own.name == named.name) else named
        if format is None:
            raise AdapterError(
                f"{path} is not packed, so there is no format to merge it into.",
                where="adapter.merge_aware.format",
                fix="name the format that will be served, q4_k for example",
            )
        formats[path] = format
    return formats


def round_layers(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Lets the adapted layers that ``formats`` names answer with their merged weights as they are now."""
    for path, format in formats.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, LoraLinear)
        planes = merged_planes(layer, format, name=f"{path}.weight")
        if layer.merged is None:  # a copy: the base's own planes may be among them
            layer.merged = Merged(format, {key: plane.detach().clone() for key, plane in planes.items()})
        else:
            for key, plane in planes.items():
                layer.merged.planes[key].copy_(plane)


def _rehearse(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Packs a row of each shape, so that what cannot be packed is known before the first step and not at the last."""
    done: set[tuple[str, int]] = set()
    for path, layer in lora_modules(model).items():
        format, (_, in_features) = formats[path], features(layer.base)
        key = (format.name, in_features)
        if key not in done and not can_fold(format, layer.group_size):
            done.add(key)
            format.encode(merged_weight(layer, torch.float32)[:1], name=f"{path}.weight")
