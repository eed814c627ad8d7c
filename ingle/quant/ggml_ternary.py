"""GGUF's ternary formats: -1, 0 and 1 with a float16 scale ``d`` for 256, the largest weight of the block.

====== ======================== ====================
format bytes                    weight
====== ======================== ====================
TQ1_0  qs[48], qh[4], d         ``d * (trit - 1)``
TQ2_0  qs[64], d                ``d * (q - 1)``
====== ======================== ====================

A byte of TQ1_0 is a fraction of 256 whose digits with base 3 are five trits (four in ``qh``); byte ``l`` of 32, 16 or
4 holds weights that lie as far apart.  Packing takes the nearest of the three: it keeps weights that are ternary
already, and loses most of any others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ingle.config.ggml import TQ1_0Base, TQ2_0Base
from ingle.quant.ggml import GgmlBlocks, half
from ingle.quant.ggml_k import fields_of


@dataclass(frozen=True)
class TQ1_0(GgmlBlocks):
    """Ternary weights, five to a byte."""

    base = TQ1_0Base
    scale_bytes = ((52, 54),)
    uses_importance = False

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * (trit - 1)``."""
        parts = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
        trits = [trits_of(blocks_ONB[..., first:stop], count) for first, stop, count in parts]
        return half(blocks_ONB, 52) * (torch.cat(trits, dim=-1).float() - 1)


@dataclass(frozen=True)
class TQ2_0(GgmlBlocks):
    """Ternary weights, four to a byte."""

    base = TQ2_0Base
    scale_bytes = ((64, 66),)
    uses_importance = False

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``d * (q - 1)``."""
        return half(blocks_ONB, 64) * (fields_of(blocks_ONB[..., :64], 2).float() - 1)


def trits_of(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` trits of every byte: first those of all bytes, then the second ones."""
    factors = torch.tensor([3**number for number in range(count)], device=packed.device).unsqueeze(-1)
    return ((packed.int().unsqueeze(-2) * factors & 255) * 3 >> 8).flatten(-2)
