"""Reads the tensors of quantized BitNet checkpoints, which transformers calls ``quant_method: bitnet``.

=================== ================================================================================
key after the layer content
=================== ================================================================================
weight              uint8 [O / 4, I]; a byte holds rows that are O / 4 apart, the first in its lowest bits
weight_scale        one number; a weight is its code minus one, times or divided by the scale
=================== ================================================================================

Only ``config.json`` tells whether the scale multiplies or divides: with ``linear_class: autobitlinear`` (Microsoft's
checkpoints) it multiplies, with ``bitlinear`` (the default of transformers) it divides. transformers also rounds the
inputs of these layers to eight bits; Ingle keeps them in the compute dtype.

Source: transformers ``integrations/bitnet.py``: ``unpack_weights``, ``BitLinear``, ``AutoBitLinear``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant.format import Format
from ingle.quant.plane import as_bytes
from ingle.quant.ternary import Ternary, codes_to_bytes


def from_bitnet(
    tensors: Mapping[str, Tensor], *, divides: bool, name: str = "weight"
) -> tuple[Format, dict[str, Tensor]]:
    """Returns the format and planes of a layer; codes are rearranged, never rounded.

    Args:
        tensors: By their keys (see the module), without the layer's name.
        divides: Whether the scale divides.
        name: The layer's name for errors.

    Raises:
        QuantizationError: The tensors are not those of a BitNet layer, a code is not ternary, or the scale is invalid.
    """
    if missing := [key for key in ("weight", "weight_scale") if key not in tensors]:
        raise QuantizationError(f"{name} is not a BitNet layer.", where=name, why=f"{missing[0]} is missing")
    data, scale = tensors["weight"], tensors["weight_scale"].float()
    if data.dtype != torch.uint8 or data.dim() != 2 or scale.numel() != 1:
        raise QuantizationError(
            f"{name} is not a BitNet layer.",
            where=name,
            why=f"weight {data.dtype} {list(data.shape)}, weight_scale {list(scale.shape)}",
        )
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device)
    codes_OI = (data.unsqueeze(0) >> shifts.view(-1, 1, 1) & 3).flatten(0, 1)
    if bool((codes_OI > 2).any()):
        raise QuantizationError(f"{name} contains codes that are not ternary.", where=name)
    scale = (1 / scale if divides else scale).reshape(1, 1).half()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise QuantizationError(f"{name} has a scale that is not a positive float16.", where=name)
    return Ternary(), {"codes": codes_to_bytes(codes_OI), "scale": as_bytes(scale)}
