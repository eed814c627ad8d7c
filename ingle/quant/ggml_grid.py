"""GGUF's IQ1 to IQ3 formats: blocks of 256 weights whose codes name rows of four or eight weights in a grid.

======= ================================================ =========== ==================================
format  bytes                                            row         weight
======= ================================================ =========== ==================================
IQ1_S   d, qs[32], qh[16]                                8 of 2048   ``d * (2 sc + 1) * (row +- 1/8)``
IQ1_M   qs[32], qh[16], scales[8] with d                 8 of 2048   ``d * (2 sc + 1) * (row +- 1/8)``
IQ2_XXS d, 8 times codes[4], signs and scale[4]          8 of 256    ``d * (sc + 1/2) / 4 * +-row``
IQ2_XS  d, codes with signs[64], scales[8]               8 of 512    ``d * (sc + 1/2) / 4 * +-row``
IQ2_S   d, qs[32], signs[32], qh[8], scales[8]           8 of 1024   ``d * (sc + 1/2) / 4 * +-row``
IQ3_XXS d, qs[64], signs and scales[32]                  4 of 256    ``d * (sc + 1/2) / 2 * +-row``
IQ3_S   d, qs[64], qh[8], signs[32], scales[4]           4 of 512    ``d * (2 sc + 1) * +-row``
======= ================================================ =========== ==================================

They are read, not written: which row stands for some weights is a search in the lattice that the grid is cut from,
led by an importance matrix without which the result is of no use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ingle.config.ggml import (
    IQ1_MBase,
    IQ1_SBase,
    IQ2_SBase,
    IQ2_XSBase,
    IQ2_XXSBase,
    IQ3_SBase,
    IQ3_XXSBase,
)
from ingle.kernels.ggml.grids import read_grid
from ingle.quant.ggml import GgmlBlocks, half


@dataclass(frozen=True)
class GgmlGrid(GgmlBlocks):
    """A format whose codes name rows of a grid."""

    def grid(self, device: torch.device) -> Tensor:
        """The rows of the grid, float32."""
        return torch.from_numpy(read_grid(self.name)).to(device, torch.float32)

    def rows(self, codes: Tensor) -> Tensor:
        """The rows that codes name, ``[..., row]``."""
        return self.scratch.table(self.grid, codes.device)[codes]


@dataclass(frozen=True)
class IQ2_XXS(GgmlGrid):
    """Codes of 8 bits; seven signs and the eighth that makes their number even; a scale for 32."""

    base = IQ2_XXSBase

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (sc + 1/2)) / 4 * row``."""
        parts = blocks_ONB[..., 2:].unflatten(-1, (8, 8))
        words = words_of(parts[..., 4:], torch.int32)
        scale = half(blocks_ONB, 0).unsqueeze(-1) * ((words >> 28 & 15).float() + 0.5) * 0.25
        return place(scale, self.rows(parts[..., :4].int()), seven_signs(words))


@dataclass(frozen=True)
class IQ2_XS(GgmlGrid):
    """Codes of 9 bits with seven signs in one word; a scale for 16."""

    base = IQ2_XSBase

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (sc + 1/2)) / 4 * row``."""
        words = words_of(blocks_ONB[..., 2:66], torch.int16).int() & 0xFFFF
        scale = half(blocks_ONB, 0) * (halves(blocks_ONB[..., 66:]).float() + 0.5) * 0.25
        signs = signs_of(complete(words >> 9)).unflatten(-2, (16, 2))
        return place(scale.unsqueeze(-1), self.rows(words & 511).unflatten(-2, (16, 2)), signs)


@dataclass(frozen=True)
class IQ2_S(GgmlGrid):
    """Codes of 10 bits, eight signs, a scale for 16."""

    base = IQ2_SBase

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (sc + 1/2)) / 4 * row``."""
        codes = blocks_ONB[..., 2:34].int() | fields(blocks_ONB[..., 66:74].int(), (0, 2, 4, 6), 3) << 8
        scale = half(blocks_ONB, 0) * (halves(blocks_ONB[..., 74:]).float() + 0.5) * 0.25
        signs = signs_of(blocks_ONB[..., 34:66].int()).unflatten(-2, (16, 2))
        return place(scale.unsqueeze(-1), self.rows(codes).unflatten(-2, (16, 2)), signs)


@dataclass(frozen=True)
class IQ3_XXS(GgmlGrid):
    """Codes of 8 bits; seven signs and the eighth that makes their number even; a scale for 32."""

    base = IQ3_XXSBase

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (sc + 1/2)) / 2 * row``."""
        words = words_of(blocks_ONB[..., 66:], torch.int32).unsqueeze(-1)
        scale = half(blocks_ONB, 0).unsqueeze(-1) * ((words >> 28 & 15).float() + 0.5) * 0.5
        rows = self.rows(blocks_ONB[..., 2:66].int()).unflatten(-2, (8, 4, 2)).flatten(-2)
        return place(scale, rows, seven_signs(words))


@dataclass(frozen=True)
class IQ3_S(GgmlGrid):
    """Codes of 9 bits, eight signs, a scale for 32."""

    base = IQ3_SBase

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (2 sc + 1)) * row``."""
        codes = blocks_ONB[..., 2:66].int() | fields(blocks_ONB[..., 66:74].int(), tuple(range(8)), 1) << 8
        scale = half(blocks_ONB, 0) * (2 * halves(blocks_ONB[..., 106:]) + 1).float()
        rows = self.rows(codes).unflatten(-2, (8, 4, 2)).flatten(-2)
        return place(scale.unsqueeze(-1), rows, signs_of(blocks_ONB[..., 74:106].int()).unflatten(-2, (8, 4)))


@dataclass(frozen=True)
class IQ1_S(GgmlGrid):
    """Codes of 11 bits, a scale and a shift for 32."""

    base = IQ1_SBase

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (2 sc + 1)) * (row +- 1/8)``."""
        words = words_of(blocks_ONB[..., 34:], torch.int16).int() & 0xFFFF
        codes = blocks_ONB[..., 2:34].int() | fields(words, (0, 3, 6, 9), 7) << 8
        scale = half(blocks_ONB, 0) * (2 * (words >> 12 & 7) + 1).float()
        shift = 0.125 - 0.25 * (words >> 15).float()
        rows = self.rows(codes).unflatten(-2, (8, 4)) + shift[..., None, None]
        weights: Tensor = scale[..., None, None] * rows
        return weights.flatten(-3)


@dataclass(frozen=True)
class IQ1_M(GgmlGrid):
    """Codes of 11 bits, a scale for 16, a shift for 8; the bits of ``d`` lie in four places."""

    base = IQ1_MBase

    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """``(d * (2 sc + 1)) * (row +- 1/8)``."""
        words = words_of(blocks_ONB[..., 48:], torch.int16).int() & 0xFFFF
        bits = sum((words[..., number] >> 12) << 4 * number for number in range(4))
        d = torch.as_tensor(bits, device=words.device).to(torch.uint16).view(torch.float16).float().unsqueeze(-1)
        scale = d * (2 * fields(words, (0, 3, 6, 9), 7) + 1).float()
        high = halves(blocks_ONB[..., 32:48])
        codes = blocks_ONB[..., :32].int() | (high & 7) << 8
        shift = 0.125 - 0.25 * (high >> 3).float()
        rows = (self.rows(codes) + shift.unsqueeze(-1)).unflatten(-2, (16, 2))
        weights: Tensor = scale[..., None, None] * rows
        return weights.flatten(-3)


def place(scale: Tensor, rows: Tensor, signs: Tensor) -> Tensor:
    """``(scale * row) * sign``, flat: a scale ``[..., part, 1]``, rows and signs ``[..., part, number, row]``."""
    return (scale.unsqueeze(-1) * rows * signs).flatten(-3)


def words_of(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers of several bytes."""
    words: Tensor = packed.clone(memory_format=torch.contiguous_format).view(dtype)  # they may lie at an odd address
    return words


def halves(packed: Tensor) -> Tensor:
    """The low half of every byte and then its high half."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).int()


def fields(words: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Fields of every word, one after the other."""
    return (words.unsqueeze(-1) >> torch.tensor(shifts, device=words.device) & mask).flatten(-2)


def complete(signs: Tensor) -> Tensor:
    """Seven signs and the eighth, which makes the number of minus signs even."""
    odd = signs ^ signs >> 4
    odd = odd ^ odd >> 2
    return signs | ((odd ^ odd >> 1) & 1) << 7


def signs_of(packed: Tensor) -> Tensor:
    """The eight factors 1 and -1 of every byte, ``[..., 8]``."""
    return 1 - 2 * (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device) & 1).float()


def seven_signs(words: Tensor) -> Tensor:
    """The factors of four times seven signs in a word ``[..., 1]``: ``[..., 4, 8]``."""
    return signs_of(complete(fields(words, (0, 7, 14, 21), 127)))
