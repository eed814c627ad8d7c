"""What a layer becomes when its adapter is merged into it: the one place that says so, for training and for export.

Merging computes ``W + scale * B A`` in float32 and packs the result.  Where nothing is to be lost, nothing is packed
anew: a layer whose adapter changes nothing keeps its bytes, and a change that is constant inside each group (QA-LoRA)
is folded into the field of the format that adds a float to the group.

Legend: O = out_features, I = in_features, G = groups of a row.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from ingle.adapters.lora import LoraLinear
from ingle.errors import AdapterError
from ingle.quant.format import FoldingFormat, Format
from ingle.quant.linear import QuantLinear


@torch.no_grad()
def merged_weight(layer: LoraLinear, dtype: torch.dtype) -> Tensor:
    """``W + scale * B A``, ``[O, I]``: computed in float32 from the base as it is held, rounded once to ``dtype``."""
    weight_OI = base_weight(layer)
    if is_touched(layer):
        weight_OI += layer.spread(layer.delta())
    return weight_OI.to(dtype)


def base_weight(layer: LoraLinear) -> Tensor:
    """W as the base holds it, float32 ``[O, I]``; a new tensor."""
    if isinstance(layer.base, QuantLinear):
        return layer.base.decode(torch.float32)
    return layer.dense_weight(torch.float32).clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def merged_planes(
    layer: LoraLinear, format: Format | None = None, importance: Tensor | None = None, *, name: str = "weight"
) -> dict[str, Tensor]:
    """The planes of ``W + scale * B A``, the same bytes whenever and wherever they are asked for.

    Args:
        layer: A linear map with its adapter.
        format: What to pack in; None for the format of the base.
        importance: ``[I]``, for formats that weigh their error by it.
        name: Of the weight, for errors.

    Returns:
        The base's own planes where the adapter changes nothing and the format stays; new ones otherwise.

    Raises:
        AdapterError: No format is given and the base is not packed.
        QuantizationError: The format cannot hold the merged weight.
    """
    base = layer.base
    own = base.format if isinstance(base, QuantLinear) else None
    target = own if format is None else format
    if target is None:
        raise AdapterError(
            f"{name} is not packed, so there is no format to merge it into.",
            where="adapter.merge_aware.format",
            fix="name the format that will be served, q4_k for example",
        )
    if isinstance(base, QuantLinear) and own == target:
        if not is_touched(layer):
            return base.planes()
        if can_fold(target, layer.group_size):
            return target.fold(base.planes(), layer.delta())
    return target.encode(merged_weight(layer, torch.float32), importance, name=name)


def can_fold(format: Format | None, group_size: int) -> TypeGuard[FoldingFormat]:
    """Whether a change that is constant in groups of this size goes into the format exactly."""
    return isinstance(format, FoldingFormat) and format.additive_field == group_size


def is_touched(layer: LoraLinear) -> bool:
    """Whether the adapter changes the weight at all: one that was never trained has B = 0."""
    return bool(layer.lora_b.any()) and bool(layer.lora_a.any())
