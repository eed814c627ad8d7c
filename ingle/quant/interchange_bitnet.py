"""The tensors of packed BitNet checkpoints in: what transformers calls ``quant_method: bitnet``.

=================== ================================================================================
key after the layer content
=================== ================================================================================
weight              uint8 [O / 4, I]: rows O / 4 apart in the two-bit fields of a byte, the first lowest
weight_scale        one number; a weight is its code less one times it, or divided by it
=================== ================================================================================

Whether the scale multiplies or divides is written in ``config.json`` alone: ``linear_class: autobitlinear`` (as in
Microsoft's own checkpoints) multiplies, ``bitlinear`` (transformers' default) divides.  transformers rounds the inputs
of these layers to eight bits besides; here they keep the compute dtype.

Source: transformers ``integrations/bitnet.py``: ``unpack_weights``, ``BitLinear``, ``AutoBitLinear``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant.format import Format
from ingle.quant.plane import as_bytes
from ingle.quant.ternary import Ternary, pack_codes


def from_bitnet(
    tensors: Mapping[str, Tensor], *, divides: bool, name: str = "weight"
) -> tuple[Format, dict[str, Tensor]]:
    """The format and planes of one layer; codes are laid out anew, never rounded.

    Args:
        tensors: By their keys (see the module), without the layer's name.
        divides: Whether the scale divides.
        name: The layer's name, for errors.

    Raises:
        QuantizationError: The layer is not packed so, holds codes that are not ternary, or its scale is of no use.
    """
    if missing := [key for key in ("weight", "weight_scale") if key not in tensors]:
        raise QuantizationError(f"{name} is not a packed BitNet layer: {missing[0]} is missing.", where=name)
    packed, scale = tensors["weight"], tensors["weight_scale"].float()
    if packed.dtype != torch.uint8 or packed.dim() != 2 or scale.numel() != 1:
        raise QuantizationError(
            f"{name} is not a packed BitNet layer.",
            where=name,
            why=f"weight {packed.dtype} {list(packed.shape)}, weight_scale {list(scale.shape)}",
        )
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    codes_OI = (packed.unsqueeze(0) >> shifts.view(-1, 1, 1) & 3).flatten(0, 1)
    if bool((codes_OI > 2).any()):
        raise QuantizationError(f"{name} holds codes that are not ternary.", where=name)
    scale = (1 / scale if divides else scale).reshape(1, 1).half()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise QuantizationError(f"{name} has a scale that float16 does not hold.", where=name)
    return Ternary(), {"codes": pack_codes(codes_OI), "scale": as_bytes(scale)}
