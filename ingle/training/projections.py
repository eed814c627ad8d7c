"""Random linear maps from few coordinates to many weights, drawn again from a seed in each call.

A map is known by its seed, so it takes no memory between calls, and O(d + n) in a call for n weights. All maps run in
the dtype of their input.

Legend: D weights of a tensor, d coordinates, n the power of 2 at or above both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

#: Weights that are mapped at once by index.
_CHUNK = 1 << 22
#: Bits of one factor of a Walsh-Hadamard transform.
_FACTOR_BITS = 6


class Projection(Protocol):
    """P for several tensors, as ``[D, d]`` matrices that are never stored."""

    def apply(self, index: int, z_d: Tensor) -> Tensor:
        """Returns ``P z``, ``[D]``, for a tensor."""

    def adjoint(self, index: int, weights_D: Tensor) -> Tensor:
        """Returns ``P^T w``, ``[d]``, for a tensor."""


class Fastfood:
    """``P = crop(H G Q H B pad)`` for each tensor: signs B, a permutation Q, normal factors G.

    H is the Walsh-Hadamard transform. A coordinate moves all weights of each tensor. The columns over all tensors have
    about unit length, with equal parts in each tensor; the authors' have unit length in each tensor. If a tensor has
    fewer weights than coordinates, all of them still move it: z has several blocks with signs of their own, which are
    added.

    Source: Le et al. 2013, "Fastfood - Computing Hilbert Space Expansions in loglinear time" (ICML), equation 7.

    Args:
        sizes: D of each tensor.
        dim: d.
        seed: Seed of the map.
    """

    def __init__(self, sizes: Sequence[int], dim: int, seed: int) -> None:
        self._sizes, self._dim, self._seed = list(sizes), dim, seed

    def apply(self, index: int, z_d: Tensor) -> Tensor:
        """Returns ``P z``, ``[D]``, for a tensor."""
        signs, order_n, normal_n, scale = self._draw(index, z_d)
        blocks = torch.zeros(len(signs), dtype=z_d.dtype, device=z_d.device)
        blocks[: len(z_d)] = z_d
        folded_n = (blocks * signs).view(-1, len(order_n)).sum(0)
        mixed_n = hadamard(folded_n)[order_n] * normal_n
        return hadamard(mixed_n)[: self._sizes[index]] * scale

    def adjoint(self, index: int, weights_D: Tensor) -> Tensor:
        """Returns ``P^T w``, ``[d]``, for a tensor."""
        signs, order_n, normal_n, scale = self._draw(index, weights_D)
        padded_n = torch.zeros(len(order_n), dtype=weights_D.dtype, device=weights_D.device)
        padded_n[: len(weights_D)] = weights_D * scale
        mixed_n = torch.empty_like(padded_n)
        mixed_n[order_n] = hadamard(padded_n) * normal_n
        return (hadamard(mixed_n).repeat(len(signs) // len(order_n)) * signs)[: self._dim]

    def _draw(self, index: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Returns B of all blocks of z, Q, G, and the factor that gives columns unit length."""
        size = self._sizes[index]
        n = 1 << max(size - 1, 0).bit_length()
        generator = torch.Generator().manual_seed(_mix_int(self._seed, index))
        blocks = -(-self._dim // n)
        bits = torch.randint(0, 2, (blocks * n,), dtype=torch.int8, generator=generator)
        order_n = torch.randperm(n, generator=generator)
        normal_n = torch.randn(n, generator=generator, dtype=torch.float64)
        scale = 1 / math.sqrt(float(normal_n.square().sum()) * size * len(self._sizes))
        signs = bits.to(like) * 2 - 1
        return signs, order_n.to(like.device), normal_n.to(like), scale


class IndexMap:
    """Each weight is one coordinate times a sign, divided by the root of its number of weights: lengths are kept.

    Source: Li et al. 2025, "Uni-LoRA" (arXiv 2506.00799), section 3.2, with a hash in place of stored indices.

    Args:
        sizes: D of each tensor.
        dim: d.
        seed: Seed of the map.
    """

    def __init__(self, sizes: Sequence[int], dim: int, seed: int) -> None:
        self._sizes, self._dim, self._key = list(sizes), dim, _mix_int(seed, 0)
        self._starts = [0, *accumulate(sizes)]
        counts_d = torch.zeros(dim, dtype=torch.int64)
        for index in range(len(sizes)):
            for places, _, _ in self._places(index, counts_d):
                counts_d += torch.bincount(places, minlength=dim)
        self._norms_d = counts_d.clamp(min=1).double().rsqrt()

    def apply(self, index: int, z_d: Tensor) -> Tensor:
        """Returns ``P z``, ``[D]``, for a tensor."""
        scaled_d = z_d * self._norms_d.to(z_d)
        found_D = torch.empty(self._sizes[index], dtype=z_d.dtype, device=z_d.device)
        for places, signs, part in self._places(index, z_d):
            found_D[part] = scaled_d[places] * signs
        return found_D

    def adjoint(self, index: int, weights_D: Tensor) -> Tensor:
        """Returns ``P^T w``, ``[d]``, for a tensor."""
        total_d = torch.zeros(self._dim, dtype=weights_D.dtype, device=weights_D.device)
        for places, signs, part in self._places(index, weights_D):
            total_d.index_add_(0, places, weights_D[part] * signs)
        return total_d * self._norms_d.to(weights_D)

    def _places(self, index: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Yields coordinates and signs of parts of a tensor."""
        for begin in range(0, self._sizes[index], _CHUNK):
            part = slice(begin, min(begin + _CHUNK, self._sizes[index]))
            first, last = self._starts[index] + part.start, self._starts[index] + part.stop
            hashed = _mix(torch.arange(first, last, device=like.device) + self._key)
            signs = (hashed & 1).to(like.dtype) * 2 - 1
            yield (hashed >> 1 & 0x3FFF_FFFF_FFFF_FFFF) % self._dim, signs, part


def hadamard(values_n: Tensor) -> Tensor:
    """Returns the Walsh-Hadamard transform of a power of 2 of values, without a factor."""
    bits = len(values_n).bit_length() - 1
    stride = 1
    while bits > 0:
        factor_KK = _hadamard_matrix(min(bits, _FACTOR_BITS)).to(values_n)
        blocks = values_n.reshape(-1, len(factor_KK), stride)
        values_n = (blocks[..., 0] @ factor_KK if stride == 1 else factor_KK @ blocks).reshape(-1)
        stride *= len(factor_KK)
        bits -= _FACTOR_BITS
    return values_n


@cache
def _hadamard_matrix(bits: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _mix(keys: Tensor) -> Tensor:
    """Returns 64 bits that depend on all bits of the keys.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", figure 16 (SplitMix64).
    """
    keys = keys * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ _shifted(keys, shift)) * _signed(factor)
    return keys ^ _shifted(keys, 31)


def _mix_int(seed: int, index: int) -> int:
    """Returns a non-negative 63-bit number of a seed and an index."""
    return int(_mix(_mix(torch.tensor(seed)) + index)) & 0x7FFF_FFFF_FFFF_FFFF


def _shifted(keys: Tensor, bits: int) -> Tensor:
    """Shifts to the right as unsigned numbers do."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
