"""Permutations that depend on their seed alone: an update of a library must not change the order of a resumed run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def permutation(count: int, seed: int, stream: int) -> npt.NDArray[np.int64]:
    """Returns a permutation that depends on ``(seed, stream)`` alone.

    Args:
        count: Number of elements.
        seed: Of the run.
        stream: Number of the permutation within the run, such as the epoch.

    Returns:
        int64 [count].
    """
    mixed = _mix(np.array([seed & _MASK], np.uint64))[0] ^ np.uint64(stream & _MASK)
    start = _mix(np.array([mixed], np.uint64))[0]
    keys = _mix(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    return np.argsort(keys, kind="stable")


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64, a bijection of 64-bit integers.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
