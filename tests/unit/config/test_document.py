from __future__ import annotations

import pytest

from ingle.config.document import read_document, read_value, write_value
from ingle.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E-3", 1e-3),
        ("2.e-4", 2e-4),
        (".5", 0.5),
        ("+1.5e+3", 1500.0),
        ("1e3", 1000.0),
        ("-7", -7),
        ("010", 10),
        ("0x1f", 31),
        ("4_096", 4096),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("<<", "<<"),
        ("=", "="),
        ("yes", True),
        ("~", None),
        ("null", None),
        ('"3"', "3"),
        ("[a, 1, 2e-1]", ["a", 1, 0.2]),
        ("{yes: no}", {"yes": False}),
        ("", ""),
        ("  ", ""),
    ],
)
def test_scalars_have_the_expected_types(text: str, value: object) -> None:
    found = read_value(text, "--x").plain()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "3e-4",
            "1E5",
            "null",
            "no",
            "",
            " a ",
            "a: b",
            "# x",
            "two\nlines\n",
            "\t",
            "'",
            '"',
            "<<",
            "=",
            "010",
            "é😀",
        ),
        *(1e-5, 3e-4, 1.0, -0.0, 1e22, 123456789.125, 2**70, True, None, "x" * 200),
        *([], {}, ["a", 1.5], {"a b": "c: d", "1": "x"}),
    ],
)
def test_written_values_are_read_back_exactly(value: object) -> None:
    text = write_value(value)
    assert "\n" not in text
    found = read_value(text, "--x").plain()
    assert found == value and repr(found) == repr(value)


def test_lines_and_raw_text_are_kept() -> None:
    root = read_document("a: 1\nb:\n  - no\n  - 'no'\n", "f.yaml")
    assert root.value["a"].where == "f.yaml:1"
    items = root.value["b"].value
    assert [item.where for item in items] == ["f.yaml:3", "f.yaml:4"]
    assert [item.raw for item in items] == ["no", None]


def test_merge_keys_and_aliases() -> None:
    root = read_document("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n", "f")
    assert root.plain() == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}
    assert root.value["a"].value["b"] is not root.value["d"].value["b"]  # changing one does not change the other


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3", "'a' is given twice"),
        ("a: [1\nb: 2\n", "f.yaml:2", "not valid YAML"),
        ("a: b: c\n", "f.yaml:1", "not valid YAML"),
        ("\ta: 1\n", "f.yaml:1", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "f.yaml:1", "is not supported"),
        ("a: !!binary aGk=\n", "f.yaml:1", "is not supported"),
        ("a: &x [*x]\n", "f.yaml:1", "contains itself"),
        ("? [a]\n: 1\n", "f.yaml:1", "key must be a word"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2", "not valid YAML"),
        ("a: 1\nb: \0\n", "f.yaml:2", "not valid YAML"),
        ("a:\n  " + "[" * 3000, "f.yaml:2", "not valid YAML"),
        ("a:\n  " + "- " * 60 + "1", "f.yaml:2", "not valid YAML"),
        ("a:\n- " + "9" * 6000, "f.yaml:2", "has 6,000 digits"),
        ("a: 0x" + "f" * 6000, "f.yaml:1", "has 6,002 digits"),
        ("a: !!int abc\n", "f.yaml:1", "does not fit the tag !!int"),
        ("a: !!float ''\n", "f.yaml:1", "does not fit the tag !!float"),
        ("a: !!bool maybe\n", "f.yaml:1", "does not fit the tag !!bool"),
        ('a: "\\0"\n', "f.yaml:1", "U+0000"),
        ('a: "\\ud800"\n', "f.yaml:1", "U+D800"),
        ('"\\0": 1\n', "f.yaml:1", "U+0000"),
    ],
)
def test_broken_documents_name_the_line(text: str, where: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_document(text, "f.yaml")
    assert said in caught.value.message
    assert caught.value.where == where


@pytest.mark.parametrize("text", ["a0: &a0 [x, x]\n", "a0: &a0 {k: x, l: x}\n"])
def test_aliases_that_expand_to_billions_of_values_are_refused(text: str) -> None:
    for level in range(1, 40):
        text += f"a{level}: &a{level} " + (
            f"[*a{level - 1}, *a{level - 1}]\n" if "[" in text else f"{{k: *a{level - 1}, l: *a{level - 1}}}\n"
        )
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        read_document(text, "f.yaml")


def test_a_long_chain_of_merges_keeps_the_first_value_of_each_key() -> None:
    parts = ", ".join(f"{{k{number}: {number}, same: {number}}}" for number in range(2000))
    merged = read_document(f"a:\n  <<: [{parts}]\n", "f").plain()["a"]
    assert len(merged) == 2001 and merged["k1999"] == 1999 and merged["same"] == 0
