"""The lengths of the rows of adapted weights, which DoRA divides by.

They are computed once per optimizer step, from A, B and the base alone, so a resumed run computes the same values.

Legend: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ingle.adapters.lora import LoraLinear
from ingle.adapters.states import adapted_modules
from ingle.parallel import copy_rows, each_gathered

#: Smallest length, so that a row of zeros has a finite factor.
SMALLEST = 1e-30
#: Rows whose square is this much smaller than its first part are computed from their elements.
_CANCELLATION = 1e-3


def update_norms(model: nn.Module) -> None:
    """Computes the lengths of all layers with a magnitude; all ranks call it together."""
    layers = {
        path: layer
        for path, layer in adapted_modules(model).items()
        if isinstance(layer, LoraLinear) and layer.magnitude is not None
    }
    for _, layer in each_gathered(model, layers) if layers else ():
        layer.norm.copy_(row_norms(layer))


@torch.no_grad()
def start_magnitudes(model: nn.Module) -> None:
    """Sets new magnitudes to the lengths of the rows, so that training starts from the base."""
    update_norms(model)
    for layer in adapted_modules(model).values():
        if isinstance(layer, LoraLinear) and layer.magnitude is not None:
            copy_rows(layer.magnitude, layer.norm)


@torch.no_grad()
def row_norms(layer: LoraLinear) -> Tensor:
    """Returns the lengths of the rows of ``W + scale * B A``, float32 [O], without that sum.

    ``n^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B``, row by row. With B = 0 it is exactly the length of W's rows.
    """
    a_RI, b_OR = layer.factors()
    scale, weight_OI = layer.scale, layer.dense_weight(torch.float32)
    own_O = weight_OI.square().sum(1)
    mixed_O = ((weight_OI @ a_RI.t()) * b_OR).sum(1)
    change_O = ((b_OR @ (a_RI @ a_RI.t())) * b_OR).sum(1)
    squared_O = own_O + 2 * scale * mixed_O + scale**2 * change_O
    weak = squared_O < _CANCELLATION * own_O
    if bool(weak.any()):
        squared_O[weak] = (weight_OI[weak] + scale * (b_OR[weak] @ a_RI)).square().sum(1)
    return squared_O.sqrt().clamp_min(SMALLEST)
