"""GGUF's 4-bit formats whose codes index a table of 16 values: non-linear levels and 4-bit floats.

====== ========================================= ========== ====================================================
format bytes                                     block      weight
====== ========================================= ========== ====================================================
IQ4_NL d, qs[16]                                 32         ``d * level[q]``
IQ4_XS d, scales_h[2], scales_l[4], qs[128]      256        ``d * (sc - 32) * level[q]``, ``sc`` for 32 weights
MXFP4  e, qs[16]                                 32         ``2^(e - 127) * value[q]``
NVFP4  scales[4], qs[32]                         4 of 16    ``scale * value[q]``, the scale is an 8-bit float
====== ========================================= ========== ====================================================

Byte ``j`` of every 16 (8 in NVFP4) holds weight ``j`` in its low nibble and weight ``j + 16`` (``j + 8``) in its high
nibble. The scale of IQ4_XS has 6 bits, and its two high bits are in ``scales_h``. The tables of 4-bit floats hold twice
the value of a sign, two exponent bits and one mantissa bit; MXFP4 and NVFP4 multiply by half the scale.

Source: ggml's ``ggml-common.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingle.kernels.ggml.grids import FLOATS, LEVELS
from ingle.quant.ggml.blocks import GgmlBlocks, half, nibbles


class IQ4_NL(GgmlBlocks):
    """Non-linear levels in blocks of 32."""

    scale_bytes = ((0, 2),)

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``d * level[q]``."""
        return half(blocks_ONB, 0) * _look_up(LEVELS, nibbles(blocks_ONB[..., 2:]))


class IQ4_XS(GgmlBlocks):
    """Non-linear levels in blocks of 256."""

    scale_bytes = ((0, 8),)

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (sc - 32)) * level[q]``."""
        pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks_ONB.device)
        low = torch.stack((blocks_ONB[..., 4:8] & 15, blocks_ONB[..., 4:8] >> 4), dim=-1).flatten(-2)
        high = (blocks_ONB[..., 2:4].unsqueeze(-1) >> pairs & 3).flatten(-2)
        scale = half(blocks_ONB, 0) * ((low | high << 4).float() - 32)
        codes = nibbles(blocks_ONB[..., 8:].unflatten(-1, (8, 16)))
        return (scale.unsqueeze(-1) * _look_up(LEVELS, codes)).flatten(-2)


class MXFP4(GgmlBlocks):
    """4-bit floats with a power of two as the scale of 32."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``2^(e - 128) * (2 value[q])``."""
        exponent = blocks_ONB[..., :1].int()
        bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23)
        return bits.view(torch.float32) * _look_up(FLOATS, nibbles(blocks_ONB[..., 1:]))


class NVFP4(GgmlBlocks):
    """4-bit floats with an 8-bit float (4 exponent and 3 mantissa bits, no sign) as the scale of 16."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(scale / 2) * (2 value[q])``."""
        scales = blocks_ONB[..., :4].int()
        exponent, mantissa = scales >> 3 & 15, scales & 7
        normal = (exponent + 119 << 23 | mantissa << 20).view(torch.float32)
        scale = torch.where(exponent == 0, mantissa.float() * 2.0**-10, normal)
        scale = torch.where(scales == 0x7F, 0.0, scale)
        codes = nibbles(blocks_ONB[..., 4:].unflatten(-1, (4, 8)))
        return (scale.unsqueeze(-1) * _look_up(FLOATS, codes)).flatten(-2)


def _look_up(table: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.int()]
