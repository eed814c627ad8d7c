"""GGUF's k-quants: blocks of 256 weights in sub-blocks whose scales are integers too, under float16 ``d`` (``dmin``).

====== ======================================= ================================ ===========================
format bytes                                   sub-blocks                       weight
====== ======================================= ================================ ===========================
Q2_K   scales[16], qs[64], d, dmin             16 of 16, scale and min 4 bits   ``d * sc * q - dmin * mn``
Q3_K   hmask[32], qs[64], scales[12], d        16 of 16, scale 6 bits           ``d * (sc - 32) * (q - 4)``
Q4_K   d, dmin, scales[12], qs[128]            8 of 32, scale and min 6 bits    ``d * sc * q - dmin * mn``
Q5_K   d, dmin, scales[12], qh[32], qs[128]    8 of 32, scale and min 6 bits    ``d * sc * q - dmin * mn``
Q6_K   ql[128], qh[64], scales[16] signed, d   16 of 16, scale 8 bits           ``d * sc * (q - 32)``
====== ======================================= ================================ ===========================

Bytes hold weights that lie 32 apart: byte ``l`` of 32 has weights ``l``, ``l + 32``, ... from its low bits up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ingle.config.ggml import Q2_KBase, Q3_KBase, Q4_KBase, Q5_KBase, Q6_KBase
from ingle.quant.ggml import GgmlBlocks, half


@dataclass(frozen=True)
class Q2_K(GgmlBlocks):
    """2-bit integers with offsets."""

    base = Q2_KBase
    scale_bytes = ((0, 16), (80, 84))

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * sc) * q - dmin * mn``."""
        fields = blocks_ONB[..., :16]
        scale: Tensor = half(blocks_ONB, 80) * (fields & 15).float()
        minimum: Tensor = half(blocks_ONB, 82) * (fields >> 4).float()
        codes: Tensor = fields_of(blocks_ONB[..., 16:80], 2).unflatten(-1, (16, 16)).float()
        return (scale.unsqueeze(-1) * codes - minimum.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Q3_K(GgmlBlocks):
    """3-bit integers around zero; the highest bit of every code lies apart."""

    base = Q3_KBase
    scale_bytes = ((96, 110),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (sc - 32)) * (q - 4)``."""
        low, high = fields_of(blocks_ONB[..., 96:104], 4, 8), fields_of(blocks_ONB[..., 104:108], 2, 4)
        scale: Tensor = half(blocks_ONB, 108) * ((low | high << 4).float() - 32)
        codes: Tensor = fields_of(blocks_ONB[..., 32:96], 2) | fields_of(blocks_ONB[..., :32], 1) << 2
        parts: Tensor = (codes.float() - 4).unflatten(-1, (16, 16))
        return (scale.unsqueeze(-1) * parts).flatten(-2)


@dataclass(frozen=True)
class Q4_K(GgmlBlocks):
    """4-bit integers with offsets."""

    base = Q4_KBase
    scale_bytes = ((0, 16),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * sc) * q - dmin * mn``."""
        return _place(blocks_ONB, fields_of(blocks_ONB[..., 16:], 4))


@dataclass(frozen=True)
class Q5_K(GgmlBlocks):
    """5-bit integers with offsets."""

    base = Q5_KBase
    scale_bytes = ((0, 16),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * sc) * q - dmin * mn``."""
        return _place(blocks_ONB, fields_of(blocks_ONB[..., 48:], 4) | fields_of(blocks_ONB[..., 16:48], 1) << 4)


@dataclass(frozen=True)
class Q6_K(GgmlBlocks):
    """6-bit integers around zero."""

    base = Q6_KBase
    scale_bytes = ((192, 210),)

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * sc) * (q - 32)``."""
        scale = half(blocks_ONB, 208) * blocks_ONB[..., 192:208].contiguous().view(torch.int8).float()
        codes: Tensor = fields_of(blocks_ONB[..., :128], 4, 64) | fields_of(blocks_ONB[..., 128:192], 2) << 4
        parts: Tensor = (codes.float() - 32).unflatten(-1, (16, 16))
        return (scale.unsqueeze(-1) * parts).flatten(-2)


def fields_of(packed: Tensor, bits: int, stride: int = 32) -> Tensor:
    """Fields of ``bits`` bits: of every ``stride`` bytes first the lowest fields, then the next ones."""
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    fields: Tensor = packed.unflatten(-1, (-1, 1, stride)) >> shift & (1 << bits) - 1
    return fields.flatten(-3)


def _place(blocks_ONB: Tensor, codes: Tensor) -> Tensor:
    """``(d * sc) * q - dmin * mn`` with the twelve bytes of scales that Q4_K and Q5_K have."""
    low, high, mixed = blocks_ONB[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scale: Tensor = torch.cat((low & 63, mixed & 15 | low >> 2 & 48), dim=-1).float() * half(blocks_ONB, 0)
    minimum: Tensor = torch.cat((high & 63, mixed >> 4 | high >> 2 & 48), dim=-1).float() * half(blocks_ONB, 2)
    parts: Tensor = codes.unflatten(-1, (8, 32)).float()
    return (scale.unsqueeze(-1) * parts - minimum.unsqueeze(-1)).flatten(-2)
