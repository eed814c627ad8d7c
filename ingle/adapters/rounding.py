"""Trains layers through the rounding of their merge: they multiply by the weight that they will be merged into.

Quantizing costs far more than decoding, so the merged weights are quantized once per optimizer step and decoded by
every micro-batch.  They depend on the step number, A, B and the base alone, so a resumed run computes the same values.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ingle.adapters.adapted import lora_modules
from ingle.adapters.linear import features
from ingle.adapters.lora import LoraLinear, Merged
from ingle.adapters.merging import can_fold, merged_planes, merged_weight, no_merge_format
from ingle.adapters.norms import update_norms
from ingle.config.adapter import AdapterConfig, LoraAdapter, QaLoraAdapter
from ingle.config.base import FormatName, base_section
from ingle.parallel import each_gathered
from ingle.quant import make_formats
from ingle.quant.format import Format
from ingle.quant.linear import QuantLinear


class Rounding:
    """Updates the merged weights of a run in the steps that train through their rounding.

    Args:
        model: A model with its adapter attached and its weights loaded.
        adapter: The adapter section that was attached.
        num_steps: Number of optimizer steps in the run.

    Attributes:
        first_step: The first step (1-based) that trains through the rounding, or None.
        seconds: Time spent on quantization so far.

    Raises:
        AdapterError: A layer is not quantized and no format is named.
        QuantizationError: The format cannot represent a layer.
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
            _check_formats(model, self._formats)

    def prepare(self, step: int) -> None:
        """Prepares the layers for a step (1-based); call it after the last step too, with the next step's number."""
        update_norms(self._model)
        if self.first_step is None or step < self.first_step:
            return
        began = time.monotonic()
        round_layers(self._model, self._formats)
        self.seconds += time.monotonic() - began

    def to_dict(self) -> dict[str, Any] | None:
        """Returns ``formats``, ``first_step`` and ``packing_s`` for the report; None if no step was rounded."""
        if self.first_step is None:
            return None
        formats = sorted({format.name for format in self._formats.values()})
        return {"formats": formats, "first_step": self.first_step, "packing_s": self.seconds}


def resolve_formats(model: nn.Module, name: FormatName | None) -> dict[str, Format]:
    """Returns the format that each adapted layer is merged into: the named one, or that of its base.

    Raises:
        AdapterError: A layer is not quantized and no format is named.
    """
    choose = None if name is None else make_formats(base_section(name), model)
    formats: dict[str, Format] = {}
    for path, layer in lora_modules(model).items():
        own = layer.base.format if isinstance(layer.base, QuantLinear) else None
        named = None if choose is None else choose(path, *features(layer.base))
        # If the base has the named format, its options (the block size of nf4) stay, so unchanged bytes can be copied.
        format = own if named is None or (own is not None and own.name == named.name) else named
        if format is None:
            raise no_merge_format(path)
        formats[path] = format
    return formats


def round_layers(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Sets the merged weights of the layers in ``formats`` from their current A and B; all ranks call it together."""
    layers = {path: layer for path, layer in lora_modules(model).items() if path in formats}
    for path, layer in each_gathered(model, layers):
        format = formats[path]
        planes = merged_planes(layer, format, name=f"{path}.weight")
        if layer.merged is None:  # copied because the base's own planes may be among them
            layer.merged = Merged(format, {key: plane.detach().clone() for key, plane in planes.items()})
        else:
            for key, plane in planes.items():
                layer.merged.planes[key].copy_(plane)


def _check_formats(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Quantizes one row of each width, so that an impossible format fails before the first step."""
    first: dict[tuple[str, int], tuple[str, LoraLinear]] = {}
    for path, layer in lora_modules(model).items():
        if not can_fold(formats[path], layer.group_size):
            first.setdefault((formats[path].name, layer.in_features), (path, layer))
    for path, layer in each_gathered(model, dict(first.values())):
        formats[path].encode(merged_weight(layer, torch.float32)[:1], name=f"{path}.weight")
