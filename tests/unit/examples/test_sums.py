"""The arithmetic task: committed bytes are the script's, sums are right, and the splits share no pair of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType


def pairs(path: Path) -> set[frozenset[int]]:
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        a, b = map(int, row["prompt"].rstrip("=").split("+"))
        assert int(row["completion"][::-1]) == a + b and len(row["prompt"]) == 6
        found.append((a, b))
    assert len(found) == len(set(found))
    return set(map(frozenset, found))


def test_the_committed_sums_are_those_of_the_script(examples: Path, sums_script: ModuleType, tmp_path: Path) -> None:
    sums_script.main(["--output", str(tmp_path)])
    for name in ("sums.jsonl", "sums_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (examples / "align" / name).read_bytes()


def test_no_pair_is_in_both_splits(examples: Path) -> None:
    train, heldout = (pairs(examples / "align" / f"{name}.jsonl") for name in ("sums", "sums_heldout"))
    assert not train & heldout and len(train | heldout) == 100 * 101 / 2
    assert 0.08 < len(heldout) / len(train | heldout) < 0.12
