"""Finds sets that are nearly equal, by MinHash signatures that are divided into bands.

Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

#: Sets of shingles with at least this Jaccard similarity are near duplicates.
NEAR = 0.8
# 16 bands of 4 rows find a pair of similarity 0.8 with probability 1 - (1 - 0.8^4)^16 > 0.9997.
_BANDS, _BAND_ROWS = 16, 4


def sign(sets: Iterable[Hashes], count: int) -> npt.NDArray[np.uint32]:
    """Returns the MinHash signatures of ``count`` sets that are not empty, uint32 [count, hashes]."""
    rng = np.random.Generator(np.random.PCG64(0))
    num_hashes = _BANDS * _BAND_ROWS
    factors = rng.integers(0, 2**63, (num_hashes, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = rng.integers(0, 2**63, (num_hashes, 1), dtype=np.uint64)
    signatures = np.empty((count, num_hashes), dtype=np.uint32)
    for row, own in enumerate(sets):
        signatures[row] = ((factors * own + shifts) >> np.uint64(32)).min(axis=1)
    return signatures


def find_candidates(signatures: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """Returns the first and the latest earlier text with the same band, or the text itself; int32 [N, 2 * bands]."""
    found = np.empty((len(signatures), 2 * _BANDS), dtype=np.int32)
    for band in range(_BANDS):
        rows = np.ascontiguousarray(signatures[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS])
        keys = rows.view(np.dtype((np.void, rows.itemsize * _BAND_ROWS))).ravel()
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        found[:, 2 * band] = first[group]
        order = np.argsort(group, kind="stable")
        latest = np.concatenate([order[:1], order[:-1]])
        found[order, 2 * band + 1] = np.where(group[order] == group[latest], latest, order)
    return found


def jaccard(a: Hashes, b: Hashes) -> float:
    """Returns the Jaccard similarity of two sets, given in ascending order."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
