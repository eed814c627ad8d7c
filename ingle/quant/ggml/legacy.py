"""GGUF's oldest formats: blocks of 32 weights with a float16 scale ``d`` and, in some, a float16 offset ``m``.

====== =================== ==================
format bytes               weight
====== =================== ==================
Q4_0   d, qs[16]           ``d * (q - 8)``
Q4_1   d, m, qs[16]        ``d * q + m``
Q5_0   d, qh[4], qs[16]    ``d * (q - 16)``
Q5_1   d, m, qh[4], qs[16] ``d * q + m``
Q8_0   d, qs[32] signed    ``d * q``
====== =================== ==================

Byte ``j`` of ``qs`` holds weight ``j`` in its low nibble and weight ``j + 16`` in its high nibble; bit ``j`` of ``qh``
is the fifth bit of weight ``j``.

Source: ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.quant.format import FoldingFormat
from ingle.quant.ggml.blocks import GgmlBlocks, half, nibbles


class Symmetric(GgmlBlocks):
    """Integers around a zero point.

    Attributes:
        zero_point: The code of zero; 8 for 4-bit and 16 for 5-bit codes.
    """

    zero_point: ClassVar[int]
    scale_bytes = ((0, 2),)

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``d * (q - zero_point)``."""
        return half(blocks_ONB, 0) * (_codes(blocks_ONB, self.zero_point == 16).float() - self.zero_point)


class Offset(GgmlBlocks, FoldingFormat):
    """Integers with a float16 offset ``m`` at bytes 2 and 3 of a block, into which QA-LoRA deltas fold.

    Attributes:
        has_fifth_bit: Whether codes have 5 bits.
    """

    has_fifth_bit: ClassVar[bool]
    scale_bytes = ((0, 4),)

    @property
    def additive_field(self) -> int | None:
        """The block size: every block has an offset."""
        return self.block_size

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``d * q + m``."""
        return half(blocks_ONB, 0) * _codes(blocks_ONB, self.has_fifth_bit).float() + half(blocks_ONB, 2)

    def fold(self, planes: Mapping[str, Tensor], delta_ON: Tensor) -> dict[str, Tensor]:
        """Adds ``delta_ON[o, n]`` to every weight of block ``n`` of row ``o``.

        The sum ``m + delta`` is computed in float32 and rounded once to float16; nothing else changes.

        Raises:
            QuantizationError: A sum exceeds the range of float16.
        """
        blocks_ONB = self._blocks(planes).detach().clone()
        offset_ON = (half(blocks_ONB, 2).squeeze(-1) + delta_ON.to(blocks_ONB.device)).half()
        if not bool(offset_ON.isfinite().all()):
            raise QuantizationError(
                f"The delta is too large to fold into the float16 offsets of {self.name}.",
                why=f"largest delta {float(delta_ON.abs().max()):g}",
                fix="use a smaller optim.lr or adapter.alpha",
            )
        blocks_ONB[..., 2:4] = offset_ON.unsqueeze(-1).view(torch.uint8)
        return {"data": blocks_ONB.flatten(1)}


class Q4_0(Symmetric):
    """4-bit integers around zero."""

    zero_point = 8


class Q4_1(Offset):
    """4-bit integers with an offset."""

    has_fifth_bit = False


class Q5_0(Symmetric):
    """5-bit integers around zero."""

    zero_point = 16


class Q5_1(Offset):
    """5-bit integers with an offset."""

    has_fifth_bit = True


class Q8_0(GgmlBlocks):
    """8-bit integers."""

    scale_bytes = ((0, 2),)
    uses_importance = False

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``d * q``."""
        return half(blocks_ONB, 0) * blocks_ONB[..., 2:].contiguous().view(torch.int8).float()


def _codes(blocks_ONB: Tensor, has_fifth_bit: bool) -> Tensor:
    codes = nibbles(blocks_ONB[..., -16:])
    if not has_fifth_bit:
        return codes
    shift = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = blocks_ONB[..., -20:-16].unsqueeze(-1) >> shift & 1
    return codes | (bits << 4).flatten(-2)
