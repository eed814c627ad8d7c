"""Exact match: what counts as equal."""

from __future__ import annotations

import pytest

from ingle.errors import EvaluationError
from ingle.evaluation.scorers import Outputs
from ingle.evaluation.scorers.exact_match import ExactMatch, normalize_number


def match(answer: str, *targets: str, pattern: str | None = None) -> float:
    return ExactMatch(pattern).score(Outputs(answers=(answer,)), (targets,)).value


def test_whole_answers():
    assert match("  two  words\n", "two words") == 1.0
    assert match("two words", "one", "two words") == 1.0
    assert match("Two words", "two words") == 0.0
    assert match("two words.", "two words") == 0.0
    assert match("", "x") == 0.0
    assert match("1,000", "1000") == 0.0  # numbers are only read as numbers behind a pattern


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000"),
        ("$1,000.00", "1000"),
        ("3.50", "3.5"),
        ("-0", "0"),
        ("72.", "72"),
        ("+7", "7"),
        (".5", "0.5"),
        ("1,234,567", "1234567"),
        ("£20", "20"),
        ("1e3", "1e3"),
        ("100000000000000000000000000000000", "1" + "0" * 32),
    ],
)
def test_equal_numbers(one, other):
    assert normalize_number(one) == normalize_number(other)


@pytest.mark.parametrize(
    ("one", "other"), [("1,00", "100"), ("10", "1"), ("2/3", "2"), ("12,3456", "123456"), ("a", "b")]
)
def test_different_numbers(one, other):
    assert normalize_number(one) != normalize_number(other)


def test_the_last_match_counts():
    pattern = r"#### *(.+)"
    solution = "He has 3.\n#### 5\nNo, wait: 7 + 3 = 10.\n#### 1,010.0"
    assert match(solution, "Work.\n#### 1010", pattern=pattern) == 1.0
    assert match(solution, "Work.\n#### 5", pattern=pattern) == 0.0
    assert match(solution, "1010", pattern=pattern) == 1.0  # a bare result is taken whole


def test_an_answer_without_a_match_is_wrong_and_counted():
    scores = ExactMatch(r"#### *(\d+)").score(
        Outputs(answers=("72", "#### 72", "")), (("#### 72",), ("#### 72",), ("#### 1",))
    )
    assert scores.per_sample.tolist() == [0.0, 1.0, 0.0]
    assert scores.num_unparsed == 2


@pytest.mark.parametrize("pattern", ["(", "no group"])
def test_bad_patterns(pattern):
    with pytest.raises(EvaluationError) as error:
        ExactMatch(pattern)
    assert error.value.where == "evaluate.answer_pattern"
    assert error.value.fix
