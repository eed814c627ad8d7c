"""The demo's task: committed bytes are the script's, splits are disjoint, and every notice says every fact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def request_of(row: dict[str, Any]) -> str:
    return row["messages"][0]["content"]


def record_of(row: dict[str, Any]) -> dict[str, str]:
    return dict(field.split(": ", 1) for field in request_of(row).splitlines()[-1].split(" | "))


def notices_of(row: dict[str, Any]) -> list[str]:
    return [row["messages"][-1]["content"], *row.get("references", [])]


@pytest.fixture(scope="module")
def train(examples: Path) -> Rows:
    return read(examples / "demo" / "train.jsonl")


@pytest.fixture(scope="module")
def heldout(examples: Path) -> Rows:
    return read(examples / "demo" / "heldout.jsonl")


def test_committed_files_are_what_the_script_writes(task_script: ModuleType, examples: Path, tmp_path: Path) -> None:
    task_script.main(["--output", str(tmp_path)])
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (examples / "demo" / name).read_bytes(), (
            f"run make_task.py: {name} is stale"
        )


def test_sizes(train: Rows, heldout: Rows, examples: Path) -> None:
    assert len(train) >= 2_400
    assert len(heldout) == 300
    assert sum((examples / "demo" / f"{name}.jsonl").stat().st_size for name in ("train", "heldout")) < 2_500_000


def test_conversations_have_a_request_an_answer_and_several_references(train: Rows, heldout: Rows) -> None:
    for rows, count in ((train, 1), (heldout, 5)):
        for row in rows:
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            notices = notices_of(row)
            assert len(notices) == len(set(notices)) == count


def test_splits_share_no_record_and_no_leading_pair(train: Rows, heldout: Rows) -> None:
    assert len({request_of(row) for row in train + heldout}) == len(train) + len(heldout)

    def pairs(rows: Rows) -> set[tuple[str, ...]]:
        return {tuple(record_of(row).items())[:2] for row in rows}

    assert not pairs(train) & pairs(heldout)


def test_no_notice_is_in_both_splits(train: Rows, heldout: Rows) -> None:
    assert not {n for row in train for n in notices_of(row)} & {n for row in heldout for n in notices_of(row)}


def test_every_notice_says_every_fact(train: Rows, heldout: Rows) -> None:
    for row in train + heldout:
        for notice in notices_of(row):
            missing = [value for value in record_of(row).values() if value.lower() not in notice.lower()]
            assert not missing, (missing, notice)


def test_a_marked_share_holds_values_unseen_in_training(task_script: ModuleType, train: Rows, heldout: Rows) -> None:
    values = task_script.read_sections(task_script.HERE / "values.txt")
    parsed = [task_script.Value.parse(line) for lines in values.values() for line in lines]
    unseen = {value.text for value in parsed if value.is_unseen} - {
        value.text for value in parsed if not value.is_unseen
    }
    assert not any(unseen & set(record_of(row).values()) for row in train)
    share = sum(bool(unseen & set(record_of(row).values())) for row in heldout) / len(heldout)
    assert share == pytest.approx(task_script.UNSEEN_SHARE, abs=0.02)


def test_several_kinds_and_optional_fields(heldout: Rows) -> None:
    kinds = {next(iter(record_of(row))) for row in heldout}
    assert kinds == {"event", "lost", "found", "sale", "class", "warning", "wanted"}
    assert len({tuple(record_of(row)) for row in heldout}) > 20


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("an unfilled slot", r"[{}\[\]|]"),
        ("two spaces", r"  "),
        ("a before a vowel", r"\b[Aa] [aeio]"),
        ("an before a consonant", r"\b[Aa]n [^aeiou]"),
        ("a small letter after a stop", r"[.!?] [a-z]"),
        ("two stops", r"[.!?,]{2}"),
        ("a space before a stop", r" [.,!?:]"),
        ("is with a plural", r"is (?:fallen branches|loose stones|falling tiles|low-flying swans)"),
    ],
)
def test_notices_are_free_of(train: Rows, heldout: Rows, fault: str, pattern: str) -> None:
    found = [notice for row in train + heldout for notice in notices_of(row) if re.search(pattern, notice)]
    assert not found, f"{fault}: {found[0]}"


def test_notices_begin_with_a_capital_and_end_with_a_stop(train: Rows, heldout: Rows) -> None:
    for row in train + heldout:
        for notice in notices_of(row):
            assert notice[0].isupper() or notice[0].isdigit(), notice
            assert notice[-1] in ".!?", notice


def test_references_differ_in_wording(heldout: Rows) -> None:
    """Five notices of a record begin in at least three ways and none repeats another's first sentence."""
    for row in heldout:
        firsts = [re.split(r"(?<=[.!?]) ", notice)[0] for notice in notices_of(row)]
        assert len(set(firsts)) == len(firsts)
        assert len({tuple(first.split()[:2]) for first in firsts}) >= 3, firsts


def test_values_suit_each_other(task_script: ModuleType) -> None:
    pond, ice, bull = (
        task_script.Value.parse(line) for line in ("pond ; spot.water", "* ice ; spot.water cost.x", "bull ; spot.land")
    )
    assert pond.suits(ice) and ice.is_unseen and not bull.suits(pond)
    assert task_script.Value.parse("Monday").suits(bull)
