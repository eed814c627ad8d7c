"""GGUF's k-quants and ternary formats: super-blocks of 256 weights with float16 scales ``d`` (and ``dmin``).

====== ======================================= ================================ ===========================
format bytes                                   sub-blocks                       weight
====== ======================================= ================================ ===========================
Q2_K   scales[16], qs[64], d, dmin             16 of 16, scale and min 4 bits   ``d * sc * q - dmin * mn``
Q3_K   hmask[32], qs[64], scales[12], d        16 of 16, scale 6 bits           ``d * (sc - 32) * (q - 4)``
Q4_K   d, dmin, scales[12], qs[128]            8 of 32, scale and min 6 bits    ``d * sc * q - dmin * mn``
Q5_K   d, dmin, scales[12], qh[32], qs[128]    8 of 32, scale and min 6 bits    ``d * sc * q - dmin * mn``
Q6_K   ql[128], qh[64], scales[16] signed, d   16 of 16, scale 8 bits           ``d * sc * (q - 32)``
TQ1_0  qs[48], qh[4], d                                                         ``d * (trit - 1)``
TQ2_0  qs[64], d                                                                ``d * (q - 1)``
====== ======================================= ================================ ===========================

Weights that share a byte are 32 apart: byte ``l`` of 32 holds weights ``l``, ``l + 32``, ... starting at its low bits.
A byte of TQ1_0 is a fraction of 256 whose base-3 digits are five trits (four in ``qh``). The scale of a ternary format
is the absmax of the block; encoding takes the nearest of the three values. This is exact for ternary weights, but loses
most of the information in other weights.

Source: ggml's ``ggml-common.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingle.quant.ggml.blocks import GgmlBlocks, bit_fields, half


class Q2_K(GgmlBlocks):
    """2-bit integers with offsets."""

    scale_bytes = ((0, 16), (80, 84))

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * sc) * q - dmin * mn``."""
        fields = blocks_ONB[..., :16]
        scale = half(blocks_ONB, 80) * (fields & 15).float()
        minimum = half(blocks_ONB, 82) * (fields >> 4).float()
        return _scale_parts(scale, bit_fields(blocks_ONB[..., 16:80], 2).float(), minimum)


class Q3_K(GgmlBlocks):
    """3-bit integers around zero; the high bits of the codes are stored separately."""

    scale_bytes = ((96, 110),)

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (sc - 32)) * (q - 4)``."""
        low, high = bit_fields(blocks_ONB[..., 96:104], 4, 8), bit_fields(blocks_ONB[..., 104:108], 2, 4)
        scale = half(blocks_ONB, 108) * ((low | high << 4).float() - 32)
        codes = bit_fields(blocks_ONB[..., 32:96], 2) | bit_fields(blocks_ONB[..., :32], 1) << 2
        return _scale_parts(scale, codes.float() - 4)


class Q4_K(GgmlBlocks):
    """4-bit integers with offsets."""

    scale_bytes = ((0, 16),)

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * sc) * q - dmin * mn``."""
        return _dequantize_45(blocks_ONB, bit_fields(blocks_ONB[..., 16:], 4))


class Q5_K(GgmlBlocks):
    """5-bit integers with offsets."""

    scale_bytes = ((0, 16),)

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * sc) * q - dmin * mn``."""
        codes = bit_fields(blocks_ONB[..., 48:], 4) | bit_fields(blocks_ONB[..., 16:48], 1) << 4
        return _dequantize_45(blocks_ONB, codes)


class Q6_K(GgmlBlocks):
    """6-bit integers around zero."""

    scale_bytes = ((192, 210),)

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * sc) * (q - 32)``."""
        scale = half(blocks_ONB, 208) * blocks_ONB[..., 192:208].contiguous().view(torch.int8).float()
        codes = bit_fields(blocks_ONB[..., :128], 4, 64) | bit_fields(blocks_ONB[..., 128:192], 2) << 4
        return _scale_parts(scale, codes.float() - 32)


class TQ1_0(GgmlBlocks):
    """Ternary weights, five to a byte."""

    scale_bytes = ((52, 54),)
    uses_importance = False

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``d * (trit - 1)``."""
        parts = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
        trits = torch.cat([_trits(blocks_ONB[..., first:end], count) for first, end, count in parts], dim=-1)
        return half(blocks_ONB, 52) * (trits.float() - 1)


class TQ2_0(GgmlBlocks):
    """Ternary weights, four to a byte."""

    scale_bytes = ((64, 66),)
    uses_importance = False

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``d * (q - 1)``."""
        return half(blocks_ONB, 64) * (bit_fields(blocks_ONB[..., :64], 2).float() - 1)


def _scale_parts(scale: Tensor, codes: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Returns ``scale * codes - minimum`` with one scale and minimum for each sub-block."""
    weights: Tensor = scale.unsqueeze(-1) * codes.unflatten(-1, (scale.shape[-1], -1))
    return (weights if minimum is None else weights - minimum.unsqueeze(-1)).flatten(-2)


def _dequantize_45(blocks_ONB: Tensor, codes: Tensor) -> Tensor:
    """Returns ``(d * sc) * q - dmin * mn`` with the twelve bytes of scales of Q4_K and Q5_K."""
    low, high, mixed = blocks_ONB[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((low & 63, mixed & 15 | low >> 2 & 48), dim=-1).float() * half(blocks_ONB, 0)
    minimum = torch.cat((high & 63, mixed >> 4 | high >> 2 & 48), dim=-1).float() * half(blocks_ONB, 2)
    return _scale_parts(scale, codes.float(), minimum)


def _trits(data: Tensor, count: int) -> Tensor:
    """Returns the first trit of every byte, then the second ones, up to ``count``."""
    factors = torch.tensor([3**number for number in range(count)], device=data.device).unsqueeze(-1)
    return ((data.int().unsqueeze(-2) * factors & 255) * 3 >> 8).flatten(-2)
