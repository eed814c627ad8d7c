"""Best-fit decreasing, exactly: as the one-by-one procedure packs, never too full, nothing split or lost."""

from __future__ import annotations

import numpy as np
import pytest

from ingle.data.packing import pack
from ingle.errors import DataError


def best_fit_decreasing(lengths, room):
    """The textbook procedure, one document at a time; the room left in each sequence.

    Which of two sequences with equal room takes a document is open, so only the rooms can be compared.
    """
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in left if r >= length]
        left.append((min(fitting) if fitting else room) - length)
        if fitting:
            left.remove(min(fitting))
    return sorted(left)


def draw(kind, rng):
    match kind:
        case "uniform":
            return rng.integers(1, 101, 400)
        case "short":
            return rng.integers(1, 9, 700)
        case "long":
            return rng.integers(50, 101, 200)
        case "lognormal":
            return np.clip(rng.lognormal(3, 1, 500), 1, 100).astype(np.int64)
        case "equal":
            return np.full(57, 33)
        case "layers":
            return np.repeat([60, 10, 7, 3], [10, 5, 20, 60])
        case "full":
            return np.full(9, 100)
        case _:
            return np.array([7])


@pytest.mark.parametrize("kind", ["uniform", "short", "long", "lognormal", "equal", "layers", "full", "one"])
@pytest.mark.parametrize("seed", range(5))
def test_packs_as_the_textbook_procedure(kind, seed):
    lengths = draw(kind, np.random.default_rng(seed)).astype(np.int64)
    sequences = pack(lengths, 100, seed=seed)
    assert sorted(100 - int(lengths[s].sum()) for s in sequences) == best_fit_decreasing(lengths.tolist(), 100)
    assert sorted(np.concatenate(list(sequences)).tolist()) == list(range(len(lengths)))
    assert max(lengths[s].sum() for s in sequences) <= 100
    assert sequences.efficiency == pytest.approx(lengths.sum() / (100 * len(sequences)))


def test_sequences_and_documents_keep_the_order_of_the_rows():
    lengths = np.random.default_rng(0).integers(1, 101, 300)
    sequences = pack(lengths, 100)
    firsts = [int(s[0]) for s in sequences]
    assert firsts == sorted(firsts)
    assert all((np.diff(s) > 0).all() for s in sequences)


def test_the_seed_decides_only_which_equal_documents_meet():
    lengths = np.random.default_rng(0).integers(1, 101, 300)
    one, again, other = (pack(lengths, 100, seed=seed) for seed in (1, 1, 2))
    assert [s.tolist() for s in one] == [s.tolist() for s in again]
    assert [s.tolist() for s in one] != [s.tolist() for s in other]
    assert len(one) == len(other)


def test_without_packing_each_document_is_alone():
    sequences = pack(np.array([3, 1, 2]), 100, packing=False)
    assert [s.tolist() for s in sequences] == [[0], [1], [2]]


def test_a_document_longer_than_a_sequence_is_an_error():
    with pytest.raises(DataError, match="longer than a sequence"):
        pack(np.array([3, 101]), 100)


def test_two_million_documents_are_packed_tightly():
    """One by one in Python this takes many minutes; it is here to be noticed if it ever does again."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 2_000_000), 1, 4096).astype(np.int64)
    sequences = pack(lengths, 4096)
    assert sequences.efficiency > 0.999
