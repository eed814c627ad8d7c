"""GGUF's 4-bit floats, in which some models are published: a sign, two bits of exponent and one of mantissa.

====== ================== ========== ===================================================
format bytes              block      weight
====== ================== ========== ===================================================
MXFP4  e, qs[16]          32         ``2^(e - 127) * value[q]``
NVFP4  scales[4], qs[32]  4 of 16    ``scale * value[q]``, the scale a float of 8 bits
====== ================== ========== ===================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ingle.config.ggml import MXFP4Base, NVFP4Base
from ingle.kernels.ggml.grids import FLOATS
from ingle.quant.ggml import GgmlBlocks, nibbles
from ingle.quant.ggml_levels import levels_of


@dataclass(frozen=True)
class MXFP4(GgmlBlocks):
    """A power of two for 32."""

    base = MXFP4Base

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """Half the power of two times twice the value."""
        exponent = blocks_ONB[..., :1].int()
        bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23)
        return bits.view(torch.float32) * levels_of(nibbles(blocks_ONB[..., 1:]), FLOATS)


@dataclass(frozen=True)
class NVFP4(GgmlBlocks):
    """A scale of 8 bits for 16: four of exponent, three of mantissa, no sign."""

    base = NVFP4Base

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """Half the scale times twice the value."""
        packed = blocks_ONB[..., :4].int()
        exponent, mantissa = packed >> 3 & 15, packed & 7
        normal = (exponent + 119 << 23 | mantissa << 20).view(torch.float32)
        scale = torch.where(exponent == 0, mantissa.float() * 2.0**-10, normal)
        scale = torch.where(packed == 0x7F, 0.0, scale)
        codes = nibbles(blocks_ONB[..., 4:].unflatten(-1, (4, 8)))
        return (scale.unsqueeze(-1) * levels_of(codes, FLOATS)).flatten(-2)
