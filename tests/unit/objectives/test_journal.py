"""The journal of an iteration: whole lines of the same origin are read again, everything else is ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ingle.models import Rollout
from ingle.objectives.rollouts.journal import Journal, delete_journals
from ingle.rewards import Scores

ORIGIN = {"trail": "abc", "options": "def"}


def rollout(draw: int, answer: int) -> Rollout:
    rng = np.random.default_rng(draw * 10 + answer)
    logps, entropies = rng.normal(size=(2, 4)).astype(np.float32)
    return Rollout(draw, answer, rng.integers(0, 99, 4).astype(np.int32), logps, entropies, "length")


STATUSES = (("ok", "error"), ("ok", "ok"))
SCORES = Scores(np.array([[0.1, np.nan], [1 / 3, 2.0]]), STATUSES, metrics={"words": 1 / 7})


def write(folder: Path, rank: int = 0) -> Path:
    journal = Journal(folder, 3, ORIGIN, rank)
    for answer in range(2):
        journal.add_rollout(rollout(7 + rank, answer))
    journal.add_scores(7 + rank, SCORES)
    return folder / f"iteration-000003-rank-{rank:05d}.jsonl"


def same(one: Rollout, other: Rollout) -> bool:
    return one[:2] == other[:2] and one.status == other.status and all(map(np.array_equal, one[2:5], other[2:5]))


def test_what_was_written_is_read_to_the_bit_by_every_rank(tmp_path: Path) -> None:
    write(tmp_path), write(tmp_path, rank=1)
    found = Journal(tmp_path, 3, ORIGIN, rank=2)
    assert found.rollouts.keys() == {(7, 0), (7, 1), (8, 0), (8, 1)} and found.scores.keys() == {7, 8}
    assert all(same(found.rollouts[key], rollout(*key)) for key in found.rollouts)
    np.testing.assert_array_equal(found.scores[8].values, SCORES.values)
    assert found.scores[8].statuses == SCORES.statuses and found.scores[8].metrics == SCORES.metrics


@pytest.mark.parametrize("origin", [{**ORIGIN, "trail": "other"}, {**ORIGIN, "options": "other"}])
def test_answers_of_other_weights_or_options_are_ignored_and_replaced(tmp_path: Path, origin: dict[str, str]) -> None:
    path = write(tmp_path)
    journal = Journal(tmp_path, 3, origin)
    assert not journal.rollouts and not journal.scores
    journal.add_rollout(rollout(1, 0))
    assert Journal(tmp_path, 3, origin).rollouts.keys() == {(1, 0)}
    assert path.read_bytes().count(b"\n") == 2


def test_a_file_that_was_cut_anywhere_gives_its_whole_lines_and_goes_on(tmp_path: Path) -> None:
    content = write(tmp_path).read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    path = next(tmp_path.iterdir())
    for cut in (0, 5, ends[0], ends[1] - 1, ends[1], ends[2] - 3, len(content) - 1):
        path.write_bytes(content[:cut])
        journal = Journal(tmp_path, 3, ORIGIN)
        assert len(journal.rollouts) + len(journal.scores) == max(0, sum(end <= cut for end in ends) - 1)
        journal.add_rollout(rollout(9, 0))
        again = Journal(tmp_path, 3, ORIGIN)
        assert again.rollouts.keys() == {*journal.rollouts, (9, 0)}


def test_a_damaged_line_ends_the_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    content[content.index(b"\n") + 20] ^= 1
    path.write_bytes(bytes(content))
    assert not Journal(tmp_path, 3, ORIGIN).rollouts


def test_old_journals_are_deleted(tmp_path: Path) -> None:
    write(tmp_path)
    delete_journals(tmp_path, 3)
    assert list(tmp_path.iterdir())
    delete_journals(tmp_path, 4)
    assert not list(tmp_path.iterdir())
