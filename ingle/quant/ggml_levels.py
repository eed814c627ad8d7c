"""GGUF's non-linear 4-bit formats: 16 levels that lie denser around zero, as NF4's do.

====== ============================================= ================================
format bytes                                         weight
====== ============================================= ================================
IQ4_NL d, qs[16]: blocks of 32                       ``d * level[q]``
IQ4_XS d, scales_h[2], scales_l[4], qs[128]: of 256  ``d * (sc - 32) * level[q]``
====== ============================================= ================================

Byte ``j`` of every 16 holds weight ``j`` in its low half and weight ``j + 16`` in its high half.  IQ4_XS has a scale
of 6 bits for 32 weights, whose two high bits lie in ``scales_h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ingle.config.ggml import IQ4_NLBase, IQ4_XSBase
from ingle.kernels.ggml.grids import LEVELS
from ingle.quant.ggml import GgmlBlocks, half, nibbles


@dataclass(frozen=True)
class IQ4_NL(GgmlBlocks):
    """Non-linear 4-bit levels in blocks of 32."""

    base = IQ4_NLBase
    scale_bytes = ((0, 2),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * level[q]``."""
        return half(blocks_ONB, 0) * levels_of(nibbles(blocks_ONB[..., 2:]))


@dataclass(frozen=True)
class IQ4_XS(GgmlBlocks):
    """Non-linear 4-bit levels in blocks of 256."""

    base = IQ4_XSBase
    scale_bytes = ((0, 8),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (sc - 32)) * level[q]``."""
        pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks_ONB.device)
        low = torch.stack((blocks_ONB[..., 4:8] & 15, blocks_ONB[..., 4:8] >> 4), dim=-1).flatten(-2)
        high = (blocks_ONB[..., 2:4].unsqueeze(-1) >> pairs & 3).flatten(-2)
        codes: Tensor = low | high << 4
        scale = half(blocks_ONB, 0) * (codes.float() - 32)
        packed: Tensor = blocks_ONB[..., 8:].unflatten(-1, (8, 16))
        return (scale.unsqueeze(-1) * levels_of(nibbles(packed))).flatten(-2)


def levels_of(codes: Tensor, levels: tuple[int, ...] = LEVELS) -> Tensor:
    """The float32 levels that codes name."""
    return torch.tensor(levels, dtype=torch.float32, device=codes.device)[codes.int()]
