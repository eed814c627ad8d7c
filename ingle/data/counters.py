"""Random numbers as a pure function of seed, epoch, document, purpose and position.

Nothing is drawn from a state, so a checkpoint stores nothing, and the numbers of a document do not depend on packing,
on batch sizes or on the number of ranks.

Legend: N tokens of several documents, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: The step of SplitMix64.
GOLDEN = 0x9E3779B97F4A7C15
_FACTOR = np.uint64(0xD1342543DE82EF95)
_MASK = (1 << 64) - 1

#: The epoch of validation and of ``data inspect``: their masks never change.
FIXED_EPOCH = -1


class Purpose(IntEnum):
    """What numbers are drawn for. Each purpose has numbers of its own, so that no decision changes another."""

    SELECT = 0
    REPLACE = 1
    TOKEN = 2
    NOISE = 3
    KEEP = 4
    DENOISER = 5
    LENGTHS = 6
    STARTS = 7
    INSERT = 8
    PERMUTE = 9
    RANDOM = 10
    INSERT_RANDOM = 11
    INSERT_TOKEN = 12
    SAMPLE = 13
    MINIBATCH = 14


class Place(NamedTuple):
    """A document in an epoch; documents are numbered as in their dataset."""

    epoch: int
    document: int


def mix(x: Bits) -> Bits:
    """Computes the output function of SplitMix64, a bijection of 64-bit integers.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class PackedCounters:
    """Random numbers for documents that lie end to end.

    Args:
        seed: Seed of the run.
        places: The documents.
        lengths: Tokens of each document.
    """

    def __init__(self, seed: int, places: Sequence[Place], lengths: Sequence[int]) -> None:
        self._seed = seed
        self._epochs, self._documents = np.array(places, np.int64).reshape(-1, 2).T.astype(np.uint64)
        self._lengths = np.array(lengths, np.int64)
        ends = np.cumsum(self._lengths)
        firsts = np.repeat(ends - self._lengths, self._lengths)
        self._positions = (np.arange(self._lengths.sum()) - firsts + 1).astype(np.uint64)

    def uniform(self, purpose: Purpose) -> Floats:
        """Returns numbers in [0, 1) for each token, float64 [N]."""
        starts_D = _starts(self._seed, self._epochs, self._documents, purpose)
        return _unit(mix(np.repeat(starts_D, self._lengths) + self._positions * np.uint64(GOLDEN)))


class Counters:
    """Random numbers for one document; those of :class:`PackedCounters`, for any number of positions.

    Args:
        seed: Seed of the run.
        place: The document.
    """

    def __init__(self, seed: int, place: Place) -> None:
        self._seed, self._place = seed, place

    def bits(self, purpose: Purpose, count: int, first: int = 0) -> Bits:
        """Returns the random bits of positions ``first`` to ``first + count - 1``."""
        epoch, document = np.array([self._place], np.int64).T.astype(np.uint64)
        positions = np.arange(first + 1, first + count + 1, dtype=np.uint64)
        return mix(_starts(self._seed, epoch, document, purpose) + positions * np.uint64(GOLDEN))

    def uniform(self, purpose: Purpose, count: int, first: int = 0) -> Floats:
        """Returns numbers in [0, 1)."""
        return _unit(self.bits(purpose, count, first))

    def below(self, purpose: Purpose, count: int, limit: int) -> Integers:
        """Returns integers in [0, limit); their bias is below ``limit / 2^53``."""
        return (self.uniform(purpose, count) * limit).astype(np.int64)

    def permutation(self, purpose: Purpose, count: int) -> Integers:
        """Returns a permutation of ``count`` elements."""
        return np.argsort(self.bits(purpose, count), kind="stable")

    def choose(self, purpose: Purpose, count: int, chosen: int) -> Integers:
        """Returns ``chosen`` of ``count`` elements in order; every subset is equally likely."""
        return np.sort(self.permutation(purpose, count)[:chosen])


def bits_at(
    seed: int,
    purpose: Purpose,
    epochs: npt.ArrayLike,
    documents: npt.ArrayLike,
    positions: npt.ArrayLike,
) -> Bits:
    """Returns the bits of :meth:`Counters.bits` for one position of each of N documents, uint64 [N]."""
    parts = (np.atleast_1d(part).astype(np.int64).astype(np.uint64) for part in (epochs, documents, positions))
    epochs_N, documents_N, positions_N = parts
    return mix(_starts(seed, epochs_N, documents_N, purpose) + (positions_N + np.uint64(1)) * np.uint64(GOLDEN))


def _starts(seed: int, epochs: Bits, documents: Bits, purpose: Purpose) -> Bits:
    """Returns where the numbers of each document begin, [D]. Each part is mixed in before the next is added."""
    state = np.zeros(len(epochs), np.uint64)
    for part in (np.array([seed & _MASK], np.uint64), epochs, documents, np.array([purpose], np.uint64)):
        state = mix(state + np.uint64(GOLDEN) + part * _FACTOR)
    return mix(state)


def _unit(bits: Bits) -> Floats:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
