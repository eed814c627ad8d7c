"""English forms against a list written by hand."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def inflection(corpus_script: ModuleType) -> ModuleType:
    return sys.modules["prose.inflection"]


@pytest.mark.parametrize(
    ("verb", "past", "third", "ing", "done"),
    [
        ("mend", "mended", "mends", "mending", "mended"),
        ("chop", "chopped", "chops", "chopping", "chopped"),
        ("carry", "carried", "carries", "carrying", "carried"),
        ("play", "played", "plays", "playing", "played"),
        ("bake", "baked", "bakes", "baking", "baked"),
        ("tie", "tied", "ties", "tying", "tied"),
        ("dye", "dyed", "dyes", "dyeing", "dyed"),
        ("wash", "washed", "washes", "washing", "washed"),
        ("go", "went", "goes", "going", "gone"),
        ("swim", "swam", "swims", "swimming", "swum"),
        ("begin", "began", "begins", "beginning", "begun"),
        ("put", "put", "puts", "putting", "put"),
        ("see", "saw", "sees", "seeing", "seen"),
        ("have", "had", "has", "having", "had"),
        ("hem", "hemmed", "hems", "hemming", "hemmed"),
    ],
)
def test_verbs(inflection: ModuleType, verb: str, past: str, third: str, ing: str, done: str) -> None:
    assert [inflection.inflect(verb, form) for form in ("past", "s", "ing", "pp")] == [past, third, ing, done]


@pytest.mark.parametrize(
    ("noun", "several"),
    [
        ("cat", "cats"),
        ("box", "boxes"),
        ("berry", "berries"),
        ("day", "days"),
        ("loaf of bread", "loaves of bread"),
        ("pocket knife", "pocket knives"),
        ("goose", "geese"),
        ("sheep", "sheep"),
        ("pair of boots", "pairs of boots"),
    ],
)
def test_plurals(inflection: ModuleType, noun: str, several: str) -> None:
    assert inflection.plural(noun) == several


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a apple", "an apple"),
        ("A owl", "An owl"),
        ("a hour", "an hour"),
        ("a horse", "a horse"),
        ("a useful key", "a useful key"),
        ("a uncle", "an uncle"),
        ("a one-eyed cat", "a one-eyed cat"),
        ("a 8", "an 8"),
        ("a 7", "a 7"),
        ("banana apple", "banana apple"),
        ("a union", "a union"),
        ("a umbrella", "an umbrella"),
    ],
)
def test_articles(inflection: ModuleType, text: str, right: str) -> None:
    assert inflection.with_articles(text) == right


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (14, "fourteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (342, "three hundred and forty-two"),
        (1_005, "one thousand and five"),
        (12_300, "twelve thousand three hundred"),
    ],
)
def test_numbers_in_words(inflection: ModuleType, number: int, words: str) -> None:
    assert inflection.in_words(number) == words


@pytest.mark.parametrize(
    ("number", "word"),
    [(1, "first"), (5, "fifth"), (9, "ninth"), (12, "twelfth"), (20, "twentieth"), (33, "thirty-third"), (8, "eighth")],
)
def test_ordinals(inflection: ModuleType, number: int, word: str) -> None:
    assert inflection.ordinal(number) == word


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (0, "twelve o'clock"),
        (195, "quarter past three"),
        (525, "quarter to nine"),
        (870, "half past two"),
        (715, "five to twelve"),
        (775, "five to one"),
    ],
)
def test_clock(corpus_script: ModuleType, minutes: int, words: str) -> None:
    assert sys.modules["prose.numbers"].clock_words(minutes) == words
