"""GGUF's IQ1 to IQ3 formats: blocks of 256 weights whose codes index a codebook of four or eight weights each.

======= ================================================ =========== ==================================
format  bytes                                            codebook    weight
======= ================================================ =========== ==================================
IQ1_S   d, qs[32], qh[16]                                2048 of 8   ``d * (2 sc + 1) * (row +- 1/8)``
IQ1_M   qs[32], qh[16], scales[8] with d                 2048 of 8   ``d * (2 sc + 1) * (row +- 1/8)``
IQ2_XXS d, 8 times codes[4], signs and scale[4]          256 of 8    ``d * (sc + 1/2) / 4 * +-row``
IQ2_XS  d, codes with signs[64], scales[8]               512 of 8    ``d * (sc + 1/2) / 4 * +-row``
IQ2_S   d, qs[32], signs[32], qh[8], scales[8]           1024 of 8   ``d * (sc + 1/2) / 4 * +-row``
IQ3_XXS d, qs[64], signs and scales[32]                  256 of 4    ``d * (sc + 1/2) / 2 * +-row``
IQ3_S   d, qs[64], qh[8], signs[32], scales[4]           512 of 4    ``d * (2 sc + 1) * +-row``
======= ================================================ =========== ==================================

These formats are read-only: finding codes is a lattice search that is useless without an importance matrix.

Source: ggml's ``ggml-common.h``; the ``gguf`` package's ``quants.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingle.kernels.ggml.grids import read_grid
from ingle.quant.ggml.blocks import GgmlBlocks, half


class Codebook(GgmlBlocks):
    """A format whose codes index rows of a codebook."""

    def codebook(self, device: torch.device) -> Tensor:
        """Returns the rows of the codebook, float32."""
        return torch.from_numpy(read_grid(self.name)).to(device, torch.float32)

    def rows(self, codes: Tensor) -> Tensor:
        """Returns the rows that codes index, ``[..., row]``."""
        return self.scratch.table(self.codebook, codes.device)[codes]


class IQ2_XXS(Codebook):
    """Codes of 8 bits; seven signs, and an eighth from even parity; a scale per 32 weights."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (sc + 1/2)) / 4 * row``."""
        parts = blocks_ONB[..., 2:].unflatten(-1, (8, 8))
        words = _words(parts[..., 4:], torch.int32)
        scale = half(blocks_ONB, 0).unsqueeze(-1) * ((words >> 28 & 15).float() + 0.5) * 0.25
        return _multiply(scale, self.rows(parts[..., :4].int()), _seven_signs(words))


class IQ2_XS(Codebook):
    """Codes of 9 bits with seven signs in one word; a scale per 16 weights."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (sc + 1/2)) / 4 * row``."""
        words = _words(blocks_ONB[..., 2:66], torch.int16).int() & 0xFFFF
        scale = half(blocks_ONB, 0) * (_nibble_pairs(blocks_ONB[..., 66:]).float() + 0.5) * 0.25
        signs = _signs(_add_parity(words >> 9)).unflatten(-2, (16, 2))
        return _multiply(scale.unsqueeze(-1), self.rows(words & 511).unflatten(-2, (16, 2)), signs)


class IQ2_S(Codebook):
    """Codes of 10 bits, eight signs, a scale per 16 weights."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (sc + 1/2)) / 4 * row``."""
        codes = blocks_ONB[..., 2:34].int() | _fields(blocks_ONB[..., 66:74].int(), (0, 2, 4, 6), 3) << 8
        scale = half(blocks_ONB, 0) * (_nibble_pairs(blocks_ONB[..., 74:]).float() + 0.5) * 0.25
        signs = _signs(blocks_ONB[..., 34:66].int()).unflatten(-2, (16, 2))
        return _multiply(scale.unsqueeze(-1), self.rows(codes).unflatten(-2, (16, 2)), signs)


class IQ3_XXS(Codebook):
    """Codes of 8 bits; seven signs, and an eighth from even parity; a scale per 32 weights."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (sc + 1/2)) / 2 * row``."""
        words = _words(blocks_ONB[..., 66:], torch.int32).unsqueeze(-1)
        scale = half(blocks_ONB, 0).unsqueeze(-1) * ((words >> 28 & 15).float() + 0.5) * 0.5
        rows = self.rows(blocks_ONB[..., 2:66].int()).unflatten(-2, (8, 4, 2)).flatten(-2)
        return _multiply(scale, rows, _seven_signs(words))


class IQ3_S(Codebook):
    """Codes of 9 bits, eight signs, a scale per 32 weights."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (2 sc + 1)) * row``."""
        codes = blocks_ONB[..., 2:66].int() | _fields(blocks_ONB[..., 66:74].int(), tuple(range(8)), 1) << 8
        scale = half(blocks_ONB, 0) * (2 * _nibble_pairs(blocks_ONB[..., 106:]) + 1).float()
        rows = self.rows(codes).unflatten(-2, (8, 4, 2)).flatten(-2)
        return _multiply(scale.unsqueeze(-1), rows, _signs(blocks_ONB[..., 74:106].int()).unflatten(-2, (8, 4)))


class IQ1_S(Codebook):
    """Codes of 11 bits, a scale and a shift per 32 weights."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (2 sc + 1)) * (row +- 1/8)``."""
        words = _words(blocks_ONB[..., 34:], torch.int16).int() & 0xFFFF
        codes = blocks_ONB[..., 2:34].int() | _fields(words, (0, 3, 6, 9), 7) << 8
        scale = half(blocks_ONB, 0) * (2 * (words >> 12 & 7) + 1).float()
        shift = 0.125 - 0.25 * (words >> 15).float()
        rows: Tensor = self.rows(codes).unflatten(-2, (8, 4)) + shift[..., None, None]
        return (scale[..., None, None] * rows).flatten(-3)


class IQ1_M(Codebook):
    """Codes of 11 bits, a scale per 16 weights, a shift per 8; the bits of ``d`` are spread over four words."""

    def dequantize_blocks(self, blocks_ONB: Tensor) -> Tensor:
        """Returns ``(d * (2 sc + 1)) * (row +- 1/8)``."""
        words = _words(blocks_ONB[..., 48:], torch.int16).int() & 0xFFFF
        bits = sum((words[..., number] >> 12) << 4 * number for number in range(4))
        d = torch.as_tensor(bits, device=words.device).to(torch.uint16).view(torch.float16).float().unsqueeze(-1)
        scale = d * (2 * _fields(words, (0, 3, 6, 9), 7) + 1).float()
        high = _nibble_pairs(blocks_ONB[..., 32:48])
        codes = blocks_ONB[..., :32].int() | (high & 7) << 8
        shift = 0.125 - 0.25 * (high >> 3).float()
        rows: Tensor = (self.rows(codes) + shift.unsqueeze(-1)).unflatten(-2, (16, 2))
        return (scale[..., None, None] * rows).flatten(-3)


def _multiply(scale: Tensor, rows: Tensor, signs: Tensor) -> Tensor:
    """Returns flat ``(scale * row) * sign``: scale ``[..., part, 1]``, rows and signs ``[..., part, number, row]``."""
    return (scale.unsqueeze(-1) * rows * signs).flatten(-3)


def _words(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Reads integers of several bytes; the copy aligns them."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def _nibble_pairs(data: Tensor) -> Tensor:
    """Returns the low nibble and the high nibble of every byte in turn."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).int()


def _fields(words: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Returns the fields of every word in turn."""
    return (words.unsqueeze(-1) >> torch.tensor(shifts, device=words.device) & mask).flatten(-2)


def _add_parity(signs: Tensor) -> Tensor:
    """Adds to seven sign bits an eighth that makes the number of minus signs even."""
    odd = signs ^ signs >> 4
    odd = odd ^ odd >> 2
    return signs | ((odd ^ odd >> 1) & 1) << 7


def _signs(bits: Tensor) -> Tensor:
    """Returns the eight factors 1 or -1 of every byte, ``[..., 8]``."""
    return 1 - 2 * (bits.unsqueeze(-1) >> torch.arange(8, device=bits.device) & 1).float()


def _seven_signs(words: Tensor) -> Tensor:
    """Returns the factors of four times seven sign bits in a word ``[..., 1]``, as ``[..., 4, 8]``."""
    return _signs(_add_parity(_fields(words, (0, 7, 14, 21), 127)))
