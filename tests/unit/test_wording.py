from __future__ import annotations

import pytest

from ingle.wording import count, duration, either, first_line, size, some


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (99_999, "99,999"),
        (123_456, "123 K"),
        (999_499, "999 K"),
        (999_999, "1.00 M"),
        (1_234_567, "1.23 M"),
        (12_345_678, "12.3 M"),
        (7.0e9, "7.00 B"),
        (2.5e15, "2500 T"),
    ],
)
def test_count(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (7620, "2h07m"),
        (90000, "25h00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_size() -> None:
    assert [size(n) for n in (12, 1024, 812 * 2**20, 2**30 * 3, 2**40 * 5)] == [
        "12 B",
        "1.0 KiB",
        "812 MiB",
        "3.00 GiB",
        "5.0 TiB",
    ]


def test_lists_of_names() -> None:
    assert [either(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
    assert [some(names) for names in ((), ("b", "a"), {"d", "c", "b", "a", "e"})] == [
        "none",
        "a, b",
        "a, b, c and 2 more",
    ]


def test_the_first_line_of_an_error_is_that_of_its_cause() -> None:
    error = RuntimeError("outer")
    error.__cause__ = ValueError("inner\nmore")
    assert [first_line(one) for one in (error, RuntimeError("one\ntwo"), RuntimeError())] == [
        "inner",
        "one",
        "RuntimeError",
    ]
