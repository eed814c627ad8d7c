"""The order of training, as a pure function of one counter.

A checkpoint stores only the counter. The order of an epoch is computed from the seed and the number of the epoch, with
Ingle's own hash, so that it does not depend on library versions.
"""

from __future__ import annotations

import numpy as np

from ingle.data.packing import Indices, Sequences, permutation


class SequenceSampler:
    """Yields sequences epoch after epoch.

    Args:
        sequences: The sequences of an epoch.
        seed: Seed of the order.
        shuffle: Whether each epoch has a new order; otherwise all have the order of ``sequences``.
    """

    def __init__(self, sequences: Sequences, seed: int, shuffle: bool) -> None:
        assert len(sequences), "there are no sequences"
        self._sequences, self._seed, self._shuffle = sequences, seed, shuffle
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return len(self._sequences)

    def take(self, counter: int, n: int) -> list[Indices]:
        """Returns sequences ``counter`` to ``counter + n - 1`` of the endless stream, each an array of documents."""
        return [self._sequences[int(self.order(i // len(self))[i % len(self)])] for i in range(counter, counter + n)]

    def order(self, epoch: int) -> Indices:
        """Returns the order of an epoch: a permutation of all sequences."""
        if epoch != self._epoch:  # the last order is cached
            self._epoch, self._order = epoch, self._make_order(epoch)
        return self._order

    def _make_order(self, epoch: int) -> Indices:
        if not self._shuffle:
            return np.arange(len(self), dtype=np.int64)
        return permutation(len(self), self._seed, epoch)
