"""Converts experts from and to the tensors of published gpt-oss checkpoints, transformers' ``quant_method: mxfp4``.

Legend: E experts, O rows, I columns.

=================== ================================================================================
key after the name  content
=================== ================================================================================
blocks              uint8 ``[E, O, I / 32, 16]``; a byte holds two neighbours, the first in its low bits
scales              uint8 ``[E, O, I / 32]``; the exponent of the scale, plus 127
=================== ================================================================================

ggml stores the same numbers: the exponent, then 16 bytes that hold a value of the first half of the block in their low
bits and one of the second half in their high bits.

Source: transformers ``integrations/mxfp4.py``: ``convert_moe_packed_tensors``; ggml ``block_mxfp4``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant.format import Format
from ingle.quant.ggml.lookup import MXFP4

#: Bytes of codes in a block.
_CODES = 16


def from_mxfp4(tensors: Mapping[str, Tensor], *, name: str = "experts") -> tuple[Format, dict[str, Tensor]]:
    """Returns the format and planes of a stack of experts; codes are rearranged, never rounded.

    Args:
        tensors: By their keys (see the module), without the name of the projection.
        name: The projection's name for errors.

    Returns:
        The format, and its plane ``[E, O, bytes of a row]``.

    Raises:
        QuantizationError: The tensors are not those of such a stack.
    """
    if missing := [key for key in ("blocks", "scales") if key not in tensors]:
        raise QuantizationError(f"{name} is not a stack in MXFP4.", where=name, why=f"{missing[0]} is missing")
    blocks, scales = tensors["blocks"], tensors["scales"]
    is_stack = blocks.dim() == 4 and blocks.shape == (*scales.shape, _CODES)
    if not is_stack or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise QuantizationError(
            f"{name} is not a stack in MXFP4.",
            where=name,
            why=f"blocks {blocks.dtype} {list(blocks.shape)}, scales {scales.dtype} {list(scales.shape)}",
        )
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    halves = codes[..., :_CODES] | codes[..., _CODES:] << 4
    return MXFP4(), {"data": torch.cat((scales.unsqueeze(-1), halves), dim=-1).flatten(-2)}


def to_mxfp4(planes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a stack by their keys (see the module), without the name of the projection.

    Args:
        planes: Of :class:`~ingle.quant.ggml.lookup.MXFP4`, ``[E, O, bytes of a row]``.
    """
    blocks = planes["data"].unflatten(-1, (-1, 1 + _CODES))
    codes = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), dim=-1)
    return {"blocks": codes[..., ::2] | codes[..., 1::2] << 4, "scales": blocks[..., 0].contiguous()}
