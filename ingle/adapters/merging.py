"""Merges an adapter into its layer; training and export use the same functions, so the bytes are equal.

Merging computes ``W + scale * B A`` in float32 and quantizes the sum.  Nothing is quantized again where that can be
avoided: a layer whose adapter changes nothing keeps its bytes, and a change that is constant within each group
(QA-LoRA) is folded into the format's additive field.

Legend: O = out_features, I = in_features.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from ingle.adapters.linear import AdaptedLinear
from ingle.adapters.lora import LoraLinear
from ingle.adapters.norms import SMALLEST
from ingle.errors import AdapterError
from ingle.quant.format import FoldingFormat, Format
from ingle.quant.linear import QuantLinear


@torch.no_grad()
def merged_weight(layer: AdaptedLinear, dtype: torch.dtype) -> Tensor:
    """Returns ``W + scale * B A``, ``[O, I]``, computed in float32 and rounded once to ``dtype``.

    With a magnitude (DoRA), its rows have the lengths of the magnitude.
    """
    weight_OI = base_weight(layer)
    if not isinstance(layer, LoraLinear):
        return layer.merge(weight_OI).to(dtype)
    if is_changed(layer):
        weight_OI += layer.spread(layer.delta())
    if layer.magnitude is not None:
        lengths_O = weight_OI.square().sum(1).sqrt().clamp_min(SMALLEST)
        weight_OI *= (layer.magnitude.detach() / lengths_O)[:, None]
    return weight_OI.to(dtype)


@torch.no_grad()
def change(layer: AdaptedLinear, weight_OI: Tensor) -> Tensor:
    """Returns the change of every weight of a group by the merge, float32 ``[O, groups]``, given the base's weight."""
    if isinstance(layer, LoraLinear) and layer.magnitude is None:
        return layer.delta()
    return merged_weight(layer, torch.float32) - weight_OI


def base_weight(layer: AdaptedLinear) -> Tensor:
    """Returns a new float32 copy of the base's weight, ``[O, I]``."""
    if isinstance(layer.base, QuantLinear):
        return layer.base.decode(torch.float32)
    return layer.dense_weight(torch.float32).clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def merged_planes(
    layer: AdaptedLinear, format: Format | None = None, importance: Tensor | None = None, *, name: str = "weight"
) -> dict[str, Tensor]:
    """Returns the planes of ``W + scale * B A``.

    Args:
        layer: A linear layer with its adapter.
        format: Format of the result; None for the format of the base.
        importance: ``[I]``, for formats that weight their error by it.
        name: Name of the weight in errors.

    Returns:
        The base's own planes if the adapter changes nothing and the format stays, new planes otherwise.

    Raises:
        AdapterError: No format is given and the base is not quantized.
        QuantizationError: The format cannot represent the merged weight.
    """
    base = layer.base
    own = base.format if isinstance(base, QuantLinear) else None
    target = own if format is None else format
    if target is None:
        raise no_merge_format(name)
    if isinstance(base, QuantLinear) and own == target:
        if not is_changed(layer):
            return base.planes()
        if isinstance(layer, LoraLinear) and can_fold(target, layer.group_size):
            return target.fold(base.planes(), layer.delta())
    return target.encode(merged_weight(layer, torch.float32), importance, name=name)


def no_merge_format(name: str) -> AdapterError:
    """Returns the error for a plain weight that is to be merged without a named format."""
    return AdapterError(
        f"{name} is not quantized, so there is no format to merge it into.",
        where="adapter.merge_aware.format",
        fix="name the format that will be served, for example q4_k",
    )


def can_fold(format: Format | None, group_size: int) -> TypeGuard[FoldingFormat]:
    """Returns whether a change that is constant within groups of this size folds into a format exactly."""
    return isinstance(format, FoldingFormat) and format.additive_field == group_size


def is_changed(layer: AdaptedLinear) -> bool:
    """Returns whether the adapter changes the weight; an untrained adapter has B = 0, or subtracts what it adds."""
    if not isinstance(layer, LoraLinear):
        return layer.is_changed()
    if layer.magnitude is not None:
        return True
    a, b = layer.factors()
    half = len(a) // 2
    if len(a) == 2 * half and torch.equal(a[:half], a[half:]) and torch.equal(b[:, :half], -b[:, half:]):
        return False
    return bool(b.any()) and bool(a.any())
