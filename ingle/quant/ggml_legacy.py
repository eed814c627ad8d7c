"""GGUF's first formats: blocks of 32 weights with a float16 scale ``d`` and, in some, a float16 offset ``m``.

====== =================== ==================
format bytes               weight
====== =================== ==================
Q4_0   d, qs[16]           ``d * (q - 8)``
Q4_1   d, m, qs[16]        ``d * q + m``
Q5_0   d, qh[4], qs[16]    ``d * (q - 16)``
Q5_1   d, m, qh[4], qs[16] ``d * q + m``
Q8_0   d, qs[32] signed    ``d * q``
====== =================== ==================

Byte ``j`` of ``qs`` holds weight ``j`` in its low half and weight ``j + 16`` in its high half; bit ``j`` of ``qh`` is
the fifth bit of weight ``j``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ingle.config.ggml import Q4_0Base, Q4_1Base, Q5_0Base, Q5_1Base, Q8_0Base
from ingle.errors import QuantizationError
from ingle.quant.ggml import GgmlBlocks, half, nibbles


class WithOffset(GgmlBlocks):
    """A format whose blocks end in ``+ m``, a float16 at bytes 2 and 3: what QA-LoRA folds into."""

    @property
    def additive_field(self) -> int | None:
        """``m`` belongs to a block."""
        return self.block_size

    def fold(self, planes: Mapping[str, Tensor], delta_ON: Tensor) -> dict[str, Tensor]:
        """The planes with ``delta_ON[o, n]`` added to every weight of block ``n`` of row ``o``.

        The sum ``m + delta`` is float32, rounded once to float16; nothing else changes.

        Raises:
            QuantizationError: A sum is NaN or too large for float16.
        """
        blocks_ONB = planes["data"].detach().clone().unflatten(1, (-1, self.base.block_bytes))
        offset_ON = (half(blocks_ONB, 2).squeeze(-1) + delta_ON.to(blocks_ONB.device)).half()
        if not bool(offset_ON.isfinite().all()):
            raise QuantizationError(
                f"A change folded into {self.name} leaves the range of its float16 offset.",
                why=f"largest change {float(delta_ON.abs().max()):g}",
                fix="a smaller optim.lr or adapter.alpha",
            )
        blocks_ONB[..., 2:4] = offset_ON.unsqueeze(-1).view(torch.uint8)
        return {"data": blocks_ONB.flatten(1)}


@dataclass(frozen=True)
class Q4_0(GgmlBlocks):
    """4-bit integers around zero."""

    base = Q4_0Base
    scale_bytes = ((0, 2),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * (q - 8)``."""
        return half(blocks_ONB, 0) * (nibbles(blocks_ONB[..., 2:]).float() - 8)


@dataclass(frozen=True)
class Q4_1(WithOffset):
    """4-bit integers with an offset."""

    base = Q4_1Base
    scale_bytes = ((0, 4),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * q + m``."""
        return half(blocks_ONB, 0) * nibbles(blocks_ONB[..., 4:]).float() + half(blocks_ONB, 2)


@dataclass(frozen=True)
class Q5_0(GgmlBlocks):
    """5-bit integers around zero."""

    base = Q5_0Base
    scale_bytes = ((0, 2),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * (q - 16)``."""
        codes = nibbles(blocks_ONB[..., 6:]) | fifth_bits(blocks_ONB[..., 2:6])
        return half(blocks_ONB, 0) * (codes.float() - 16)


@dataclass(frozen=True)
class Q5_1(WithOffset):
    """5-bit integers with an offset."""

    base = Q5_1Base
    scale_bytes = ((0, 4),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * q + m``."""
        codes = nibbles(blocks_ONB[..., 8:]) | fifth_bits(blocks_ONB[..., 4:8])
        return half(blocks_ONB, 0) * codes.float() + half(blocks_ONB, 2)


@dataclass(frozen=True)
class Q8_0(GgmlBlocks):
    """8-bit integers."""

    base = Q8_0Base
    scale_bytes = ((0, 2),)
    uses_importance = False

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * q``."""
        return half(blocks_ONB, 0) * blocks_ONB[..., 2:].contiguous().view(torch.int8).float()


def fifth_bits(packed: Tensor) -> Tensor:
    """32 bits in four bytes, the lowest first, as 0 or 16 each."""
    shift = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed.unsqueeze(-1) >> shift) & 1) << 4).flatten(-2)
