"""Packs documents into sequences of at most ``max_seq_len`` tokens by best-fit decreasing.

Documents are placed in order of falling length, each into the fullest sequence that still has room for it, or into a
new one. Lengths are small integers, so sequences with equal room are interchangeable, and all documents of one length
are placed together: they fill the sequences with the least sufficient room, then those with the next larger room. Every
step uses up one class of sequences or all remaining documents of the length. The work is O(n + L log L) for n documents
and ``max_seq_len`` L, and the result is that of placing one document at a time.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), section 3.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.config.data import DataConfig
from ingle.data.counters import GOLDEN, mix
from ingle.data.dataset import Lengths, TokenDataset
from ingle.errors import DataError

Indices = npt.NDArray[np.int64]
#: Of documents or sequences; int32 if there are fewer than 2^31.
Positions = npt.NDArray[np.signedinteger[Any]]

#: Numbers of the random streams for packing and for holding rows out; the streams of epochs count up from 0.
_PACKING, HOLDING_OUT = -1, -2

#: Elements that are sorted at once.
_BLOCK = 1 << 18
#: Sequences that are measured at once.
_SEQUENCES = 1 << 12

_MASK = (1 << 64) - 1


class Sequences:
    """Sequences of document indices.

    Attributes:
        room: Tokens for which each sequence has room.
        efficiency: Tokens of all documents divided by the tokens for which all sequences have room.
    """

    def __init__(self, documents: Positions, offsets: Positions, num_tokens: int, room: int) -> None:
        self._documents, self._offsets, self.room = documents, offsets, room
        self.efficiency = num_tokens / (max(len(offsets) - 1, 1) * room)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> Indices:
        """Returns the documents of sequence ``i``."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._documents[self._offsets[i] : self._offsets[i + 1]].astype(np.int64)

    def __iter__(self) -> Iterator[Indices]:
        """Yields all sequences."""
        return (self[i] for i in range(len(self)))

    def flat(self) -> tuple[Positions, Positions]:
        """Returns the documents of all sequences, and where sequences begin."""
        return self._documents, self._offsets

    def longest(self, lengths: Lengths) -> int:
        """Returns the tokens of the longest sequence; 0 if there is none.

        Args:
            lengths: Tokens of each document.
        """
        longest = 0
        for start in range(0, len(self), _SEQUENCES):
            borders = self._offsets[start : start + _SEQUENCES + 1]
            documents = self._documents[borders[0] : borders[-1]]
            sums = np.add.reduceat(lengths[documents], borders[:-1] - borders[0], dtype=np.int64)
            longest = max(longest, int(sums.max()))
        return longest


def make_sequences(dataset: TokenDataset, data: DataConfig, seed: int, documents: Indices | None = None) -> Sequences:
    """Packs a dataset, or puts each row into its own sequence if ``data.packing`` is false.

    The documents of a row stay together, so a row may make a sequence longer than ``max_seq_len``. A sequence has room
    for the longest document, from which ``span`` may still remove tokens, or for the longest source with its target.
    Rows with several answers can be much longer than the others, so those beyond ``max_seq_len`` stay alone.

    Args:
        dataset: The documents.
        data: ``packing`` and ``max_seq_len``.
        seed: Decides which of equally long documents share a sequence.
        documents: Packs only these, ascending, with all documents of each row; None packs all.
    """
    if dataset.groups is None:
        room = max(data.max_seq_len, int(dataset.lengths.max(initial=0)))
        lengths = dataset.lengths if documents is None else dataset.lengths[documents]
        packed = pack(lengths, room, packing=data.packing, seed=seed)
        if documents is None:
            return packed
        order, borders = packed.flat()
        return Sequences(documents[order], borders, int(lengths.sum(dtype=np.int64)), room)
    offsets = dataset.groups.offsets
    chosen = np.arange(len(offsets) - 1)
    if documents is not None:
        chosen = np.unique(np.searchsorted(offsets, documents, side="right") - 1)
    lengths = np.add.reduceat(dataset.lengths, offsets[:-1])[chosen]
    longest = int(lengths.max()) if dataset.groups.names == ("source", "target") else 0
    rows = pack(lengths, max(data.max_seq_len, longest), packing=data.packing, seed=seed, long_alone=True)
    order, borders = rows.flat()
    counts = np.diff(offsets)[chosen[order]]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    placed = np.arange(ends[-1]) + np.repeat(offsets[chosen[order]] - ends[:-1], counts)
    return Sequences(placed, ends[borders], int(lengths.sum(dtype=np.int64)), data.max_seq_len)


def pack(
    lengths: Lengths, max_seq_len: int, *, packing: bool = True, seed: int = 0, long_alone: bool = False
) -> Sequences:
    """Packs documents of the given lengths; no document is split.

    Args:
        lengths: Tokens of each document, [D].
        max_seq_len: The room of a sequence.
        packing: Whether several documents share a sequence.
        seed: Decides which of equally long documents share a sequence.
        long_alone: Whether a document longer than ``max_seq_len`` is a sequence of its own rather than an error.

    Raises:
        DataError: A document is longer than ``max_seq_len``.
    """
    if not long_alone and len(lengths) and int(lengths.max()) > max_seq_len:
        raise DataError(
            "A document is longer than a sequence.",
            where=f"data.max_seq_len = {max_seq_len}",
            why=f"{int(lengths.max())} tokens",
        )
    num_tokens = int(lengths.sum(dtype=np.int64))
    if not packing:
        alone = np.arange(len(lengths) + 1, dtype=np.int64)
        return Sequences(alone[:-1], alone, num_tokens, max_seq_len)
    sequence_of = _assign(lengths, max_seq_len, seed)
    return Sequences(*_sort_by(sequence_of), num_tokens, max_seq_len)


def _assign(lengths: Lengths, room: int, seed: int) -> Positions:
    """Returns the sequence of each document; sequences are numbered in the order of their first documents."""
    key_of = permutation_keys(seed, _PACKING)
    order, borders = _sort_by(lengths)
    bins = _Bins(room)
    sequence_of = np.empty(len(lengths), dtype=order.dtype)
    for length in np.flatnonzero(np.diff(borders))[::-1].tolist():
        group = order[borders[length] : borders[length + 1]]
        shuffled = group[np.argsort(key_of(group), kind="stable")]
        sequence_of[shuffled] = bins.place(length, len(group))
    del order
    first = np.empty(bins.count, dtype=sequence_of.dtype)
    first[sequence_of[::-1]] = np.arange(len(lengths), dtype=sequence_of.dtype)[::-1]  # the last value stays
    rank = np.empty(bins.count, dtype=sequence_of.dtype)
    rank[np.argsort(first, kind="stable")] = np.arange(bins.count, dtype=sequence_of.dtype)
    for start in range(0, len(sequence_of), _BLOCK):
        sequence_of[start : start + _BLOCK] = rank[sequence_of[start : start + _BLOCK]]
    return sequence_of


def _sort_by(values: Lengths) -> tuple[Positions, Indices]:
    """Returns the positions of values in ascending order of the values, and where each value begins.

    Counts first and then sorts a block at a time, so that memory is that of the result. Positions of equal values stay
    in order.

    Args:
        values: Numbers from 0 on, [D].

    Returns:
        Positions [D], and offsets [largest value + 2].
    """
    counts = np.bincount(values) if len(values) else np.zeros(0, np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    order: Positions = np.empty(len(values), dtype=np.int32 if len(values) < 1 << 31 else np.int64)
    free = offsets[:-1].copy()
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        by_value = np.argsort(block, kind="stable")
        ranked = block[by_value]
        firsts = np.flatnonzero(np.diff(ranked, prepend=-1))
        sizes = np.diff(firsts, append=len(ranked))
        order[free[ranked] + np.arange(len(ranked)) - np.repeat(firsts, sizes)] = by_value + start
        free[ranked[firsts]] += sizes
    return order, offsets


class _Bins:
    """Sequences, grouped by the room that they have left."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._rooms: list[int] = []  # ascending
        self._with_room: dict[int, list[Indices]] = {}
        self.count = 0

    def place(self, length: int, count: int) -> Indices:
        """Puts ``count`` documents of one length into the best-fitting sequences; returns the sequence of each."""
        placed: list[Indices] = []
        while count:
            at = bisect_left(self._rooms, length)
            fits = max(self._room // length, 1)  # a document that exceeds the room stays alone
            if at < len(self._rooms):
                room = self._rooms.pop(at)
                bins = np.concatenate(self._with_room.pop(room))
                fits = room // length
            else:
                room = self._room
                num_new = -(-count // fits)
                bins = np.arange(self.count, self.count + num_new, dtype=np.int64)
                self.count += num_new
            full = min(count // fits, len(bins))
            placed.append(np.repeat(bins[:full], fits))
            self._keep(room - fits * length, bins[:full])
            count -= full * fits
            rest = bins[full:]
            if count and len(rest):  # the last sequence of the group keeps some room
                placed.append(np.repeat(rest[:1], count))
                self._keep(room - count * length, rest[:1])
                rest, count = rest[1:], 0
            self._keep(room, rest)
        return np.concatenate(placed)

    def _keep(self, room: int, bins: Indices) -> None:
        if room > 0 and len(bins):
            if room not in self._with_room:
                insort(self._rooms, room)
            self._with_room.setdefault(room, []).append(bins)


def permutation(count: int, seed: int, stream: int) -> npt.NDArray[np.int64]:
    """Returns a permutation that depends on ``(seed, stream)`` alone.

    Args:
        count: Number of elements.
        seed: Seed of the run.
        stream: Number of the permutation within the run, such as the epoch.

    Returns:
        int64 [count].
    """
    key_of = permutation_keys(seed, stream)
    keys = np.empty(count, dtype=np.uint64)
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        keys[start:stop] = key_of(np.arange(start, stop))
    return np.argsort(keys, kind="stable")


def permutation_keys(seed: int, stream: int) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.uint64]]:
    """Returns the function from elements to the keys by which a permutation orders them: uniform in 64 bits."""
    mixed = mix(np.array([seed & _MASK], np.uint64))[0] ^ np.uint64(stream & _MASK)
    start = mix(np.array([mixed], np.uint64))[0]
    return lambda elements: mix(start + (elements.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
