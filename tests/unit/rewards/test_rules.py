"""Rules against published formulas, verl's parser and the answers of GSM8K."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ingle.config.rewards import RewardConfig
from ingle.errors import RewardError
from ingle.rewards.matching import last_number
from ingle.rewards.rules import make

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl"


SECTIONS: TypeAdapter[Any] = TypeAdapter(RewardConfig)


def rule(text: str, ids: int | list[int] = 1, /, columns: dict[str, Any] | None = None, **options: Any) -> Any:
    section = SECTIONS.validate_python(options)
    tokens = [1] * ids if isinstance(ids, int) else ids
    return make(section.model_dump() | {"where": "rewards.0"})(text, tokens, columns or {})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.50 dollars.", 1234.5),
        ("$18.", 18),
        ("16-3-4=9", 9),
        ("it is -7", -7),
        ("it is \N{MINUS SIGN}7.", -7),
        ("x = (3)-4", 4),  # an operator
        ("3.14 and 1e3", 1000),
        ("2, 3, 4", 4),
        ("1,2345", 2345),
        (".5", 0.5),
        ("a loss of -$1,234.50", -1234.5),
        ("10-$3", 3),
        (r"1{,}234 or 1,\!234", 1234),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    found = last_number(text)
    assert (found is None) == (number is None) and (found is None or float(found) == number)


def test_numbers_are_compared_as_numbers() -> None:
    column = {"answer": "6 * 12 = <<6*12=72>>72\n#### 72"}
    assert rule("So it is 72.0", columns=column, kind="number") == 1
    assert rule("72 is not 73", columns=column, kind="number") == 0
    assert rule("72 or 73", columns=column, kind="number", format_score=0.1) == 0.1
    assert rule("no idea", columns=column, kind="number", format_score=0.1) == 0
    assert rule("about 72.5", columns=column, kind="number", tolerance=0.01) == 1
    assert rule("#### $1,072 (not 5)", columns={"answer": 1072}, kind="number", style="gsm8k") == 1
    assert rule("72", columns=column, kind="number", style="gsm8k") == 0
    assert rule(r"\boxed{8} and so \boxed{x = 72}, for 12 packs", columns=column, kind="number") == 1


def verl_score(text: str, truth: str) -> float:
    """The strict mode of verl's gsm8k.py, commit b178a3c."""
    found = re.findall("#### (\\-?[0-9\\.\\,]+)", text[-300:])
    return 0.0 if not found else float(found[-1].replace(",", "").replace("$", "") == truth)


@pytest.mark.parametrize(
    "text",
    [
        "#### 72",
        "#### 72.",
        "#### 72.0",
        "####72",
        "#### $72",
        "#### 1\n#### 72",
        "#### 72" + " " * 300,
        "72",
    ],
)
def test_verls_parser_is_followed_to_the_letter(text: str) -> None:
    assert rule(text, columns={"answer": "a #### 72"}, kind="number", style="verl") == verl_score(text, "72")


@pytest.mark.skipif(not GSM8K.is_file(), reason="the data of GSM8K is not there")
def test_every_solution_of_gsm8k_is_right_and_another_one_is_not() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()][:300]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        same = row["answer"].rpartition("####")[2].strip() == other["answer"].rpartition("####")[2].strip()
        for style in ("last", "gsm8k", "verl"):
            assert rule(row["answer"], columns=row, kind="number", style=style) == 1
            assert rule(other["answer"], columns=row, kind="number", style=style) == same


def test_exact_match() -> None:
    assert rule("The  Cat!", columns={"answer": ["dog", "cat"]}, kind="exact_match") == 1
    assert rule("The  Cat!", columns={"answer": "the cat!"}, kind="exact_match", normalize=False) == 0
    assert rule("None", columns={"answer": None}, kind="exact_match") is None


def test_contained_and_absent_values() -> None:
    columns = {"values": ["Mr Webb", "a key", "Monday", "the Inn"]}
    assert rule("mr Webb lost a key", columns=columns, kind="contains", column="values") == 0.25
    assert rule("mr Webb lost a key", columns=columns, kind="contains", column="values", ignore_case=True) == 0.5
    assert rule("mr Webb lost a key", columns=columns, kind="contains", column="values", absent=True) == 0.75
    assert rule("x", columns={"values": []}, kind="contains", column="values") is None


def test_patterns() -> None:
    assert rule("<a>\n1</a>", kind="format", pattern="<a>.*</a>") == 1
    assert rule("so <a>1</a>", kind="format", pattern="<a>.*</a>") == 0
    assert rule("so <a>1</a>", kind="format", pattern="<a>.*</a>", full=False) == 1
    with pytest.raises(RewardError, match="not a valid regular expression"):
        rule("", kind="format", pattern="(")


@pytest.mark.parametrize(("length", "value"), [(1, 0), (16384, 0), (18432, -0.5), (20480, -1), (30000, -1)])
def test_overlong_answers_are_punished_as_in_dapo(length: int, value: float) -> None:
    assert rule("", length, kind="overlong", max=20480, buffer=4096) == value


def test_lengths_and_repetitions() -> None:
    assert [rule("", length, kind="length", low=2, high=3) for length in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert [rule("", ids, kind="repetition", ngram=2) for ids in ([1, 2, 3, 4], [5] * 5, [1], [])] == [0, -0.75, 0, 0]
