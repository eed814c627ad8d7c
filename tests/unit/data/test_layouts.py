"""Columns are recognised, renamed and read; what fits no layout is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingle.config.data import Source
from ingle.data.layout_detection import detect_layout
from ingle.data.layouts import parse_row
from ingle.data.sources import read_examples
from ingle.data.types import Example, Message
from ingle.errors import DataError

CHAT = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "four"}]
SHARE = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "four"}]
PARTS = ("how ", "many?")
TURNS = (Message("user", "how many?"), Message("assistant", "four"))

ROWS = {
    "messages": ({"messages": CHAT}, "messages", Example("f:1", messages=TURNS)),
    "conversations by role": ({"conversations": CHAT}, "messages", Example("f:1", messages=TURNS)),
    "sharegpt": ({"conversations": SHARE}, "sharegpt", Example("f:1", messages=TURNS)),
    "alpaca": (
        {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "all of it"},
        "instruction",
        Example("f:1", prompt="Add.\n\n2, 2\n\n", completion="4"),
    ),
    "alpaca without input": (
        {"instruction": "Add.", "input": "", "output": "4"},
        "instruction",
        Example("f:1", prompt="Add.\n\n", completion="4"),
    ),
    "prompt-completion": (
        {"prompt": "a", "completion": "b"},
        "prompt-completion",
        Example("f:1", prompt="a", completion="b"),
    ),
    "question-answer": (
        {"question": "a", "answer": "b"},
        "prompt-completion",
        Example("f:1", prompt="a", completion="b"),
    ),
    "input-output": ({"input": "a", "output": "b"}, "prompt-completion", Example("f:1", prompt="a", completion="b")),
    "conversational pair": (
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        "prompt-completion",
        Example("f:1", messages=TURNS),
    ),
    "text": ({"text": "a"}, "text", Example("f:1", text="a")),
    "system column": (
        {"system": "Be brief.", "prompt": "a ", "completion": " b"},
        "prompt-completion",
        Example("f:1", messages=(Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"))),
    ),
    "references": (
        {"prompt": "a", "completion": "b", "references": ["c", "b", "c"]},
        "prompt-completion",
        Example("f:1", prompt="a", completion="b", references=("c",)),
    ),
    "references alone": (
        {"prompt": "a", "references": ["b", "c"]},
        "prompt-completion",
        Example("f:1", prompt="a", completion="b", references=("c",)),
    ),
    "messages with references alone": (
        {"messages": CHAT[:1], "references": ["four", "4"]},
        "messages",
        Example("f:1", messages=TURNS, references=("4",)),
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in PARTS]}, CHAT[1]]},
        "messages",
        Example("f:1", messages=TURNS),
    ),
    "columns filled with null": (
        {"messages": None, "prompt": "a", "completion": "b", "text": None},
        "prompt-completion",
        Example("f:1", prompt="a", completion="b"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_layouts_are_detected_and_read(name):
    row, layout, example = ROWS[name]
    found, _ = detect_layout(row, "f:1")
    assert found == layout
    assert parse_row(row, found, "f:1") == example


def test_other_fitting_layouts_are_named():
    assert detect_layout({"messages": CHAT, "prompt": "a", "completion": "b", "text": "c"}, "f:1") == (
        "messages",
        ("prompt-completion", "text"),
    )


def test_null_is_absent():
    row = {"prompt": "a", "completion": "b", "text": None, "instruction": None, "output": "c"}
    assert detect_layout(row, "f:1") == ("prompt-completion", ())


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, **options):
    warnings = []
    return list(read_examples([Source(path=str(path), **options)], on_warning=warnings.append)), warnings


def test_the_choice_among_several_is_shown_once_and_can_be_overridden(tmp_path):
    row = {"prompt": "a", "completion": "b", "text": "c"}
    path = write(tmp_path / "a.jsonl", row, row)
    examples, warnings = read(path)
    assert [e.prompt for e in examples] == ["a", "a"]
    assert len(warnings) == 1
    examples, warnings = read(path, layout="text")
    assert [e.text for e in examples] == ["c", "c"]
    assert not warnings


def test_a_later_row_of_another_layout_names_both_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"prompt": "c", "completion": "d"})
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.where == f"{path}:3"
    assert f"{path}:1" in str(caught.value.why)


def test_files_of_one_source_may_differ(tmp_path):
    write(tmp_path / "a.jsonl", {"text": "a"})
    write(tmp_path / "b.jsonl", {"messages": CHAT})
    examples, _ = read(tmp_path / "*.jsonl")
    assert [e.text for e in examples] == ["a", None]


def test_columns_rename_and_the_old_name_is_gone(tmp_path):
    path = write(tmp_path / "a.jsonl", {"mr": "a", "ref": "b", "text": "c"})
    examples, _ = read(path, columns={"prompt": "mr", "completion": "ref"})
    assert (examples[0].prompt, examples[0].completion) == ("a", "b")
    swapped, _ = read(path, columns={"prompt": "text", "completion": "mr"})
    assert (swapped[0].prompt, swapped[0].completion) == ("c", "a")
    moved, _ = read(write(tmp_path / "c.jsonl", {"prompt": "a", "completion": "b"}), columns={"text": "prompt"})
    assert moved[0].text == "a"
    crossed, _ = read(
        write(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"}),
        columns={"prompt": "completion", "completion": "prompt"},
    )
    assert (crossed[0].prompt, crossed[0].completion) == ("b", "a")


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    path = write(tmp_path / "a.jsonl", {"mr": "a", "ref": "b"})
    with pytest.raises(DataError) as caught:
        read(path, columns={"prompt": "mr", "completion": "reff"})
    assert caught.value.where == f"{path}:1"
    assert "mr, ref" in str(caught.value.why)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({}, "none"),
        ({"id": 1, "review": "x"}, "id, review"),
        ({"prompt": "a"}, "prompt"),
        ({"messages": []}, "messages must be a list such as"),
        ({"messages": "hello"}, "messages must be a list such as"),
        ({"prompt;completion": "a;b"}, "not by ';'"),
    ],
)
def test_rows_of_no_known_layout_name_their_columns(row, why):
    with pytest.raises(DataError, match="no known layout") as caught:
        detect_layout(row, "f:9")
    assert caught.value.where == "f:9"
    assert why in str(caught.value.why)


@pytest.mark.parametrize(
    ("row", "layout", "why"),
    [
        ({"text": 3}, "text", "int"),
        ({"text": None}, "text", "missing"),
        ({"prompt": "a", "completion": 4}, "prompt-completion", "int"),
        ({"prompt": "a", "completion": None}, "prompt-completion", "missing"),
        ({"prompt": "a", "completion": "b", "references": "c"}, "prompt-completion", "list"),
        ({"messages": "x"}, "messages", "no list"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"content": "x"}]}, "messages", "message 1 has no 'role'"),
        ({"messages": [CHAT[0], {"role": "wizard", "content": "x"}]}, "messages", "message 2 has the role 'wizard'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "not text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages", "tool_calls"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "messages", "'tools'"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "tools": "[{}]"}, "prompt-completion", "'tools'"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, "messages", "message 2 is excluded from training"),
        ({"messages": [CHAT[0], {**CHAT[1], "train": False}]}, "messages", "message 2 is excluded"),
        ({"conversations": [{"from": "human"}]}, "sharegpt", "not text"),
        ({"instruction": "a"}, "instruction", "'output' is missing"),
    ],
)
def test_misfits_are_errors_with_a_reason(row, layout, why):
    with pytest.raises(DataError) as caught:
        parse_row(row, layout, "f:9", "f:1")
    assert caught.value.where == "f:9"
    assert why in str(caught.value.why)
    assert "since f:1" in str(caught.value.why)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"text": "a\ud83d"}, "text"),
        ({"prompt": "a", "completion": "\udc00b"}, "prompt-completion"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "\ud83d"}]}, "messages"),
        ({"prompt": "a", "completion": "b", "references": ["\ud83d"]}, "prompt-completion"),
    ],
)
def test_half_of_a_surrogate_pair_is_an_error_with_its_line(row, layout):
    with pytest.raises(DataError, match="malformed") as caught:
        parse_row(row, layout, "f:9")
    assert caught.value.where == "f:9"
    assert "surrogate" in str(caught.value.why)


@pytest.mark.parametrize("extra", [{"tools": []}, {"tools": None}, {"tools": "[]"}, {"id": 7}])
def test_columns_that_say_nothing_are_passed_over(extra):
    turns = [CHAT[0], {**CHAT[1], "weight": 1, "train": True}]
    assert len(parse_row({"messages": turns, **extra}, "messages", "f:1").messages) == 2


@pytest.mark.parametrize(
    ("row", "layout", "why"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}]}]},
            "messages",
            "message 1 has a part of type 'image_url'",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image> What is it?"}], "image": "cat.png"},
            "sharegpt",
            "the column 'image' has an image",
        ),
        ({"prompt": "What is it?", "completion": "a cat", "images": [{"bytes": ""}]}, "prompt-completion", "'images'"),
        ({"text": "a cat", "label": "pet", "image": "cat.png"}, "labelled", "the column 'image' has an image"),
        ({"question": "Where?", "context": "Here.", "images": "a.png"}, "squad", "the column 'images' has an image"),
    ],
)
def test_rows_with_images_are_refused_with_their_line(row: dict[str, Any], layout: Any, why: str) -> None:
    with pytest.raises(DataError, match="models are trained on text only") as error:
        parse_row(row, layout, "rows.jsonl:17")
    assert error.value.where == "rows.jsonl:17"
    assert why in str(error.value.why)


def test_the_name_of_an_image_is_no_text_to_classify(tmp_path: Path) -> None:
    path = tmp_path / "pets.jsonl"
    path.write_text('{"image": "pets/1.png", "label": "cat"}\n')
    with pytest.raises(DataError, match="models are trained on text only") as error:
        list(read_examples([Source(path=str(path))], objective="classify"))
    assert error.value.where == f"{path}:1"
    named = Source(path=str(path), columns={"text": "image"})
    assert [row.text for row in read_examples([named], objective="classify")] == ["pets/1.png"]


def test_a_text_row_may_name_an_image_file() -> None:
    row = {"prompt": "What is it?", "completion": "a cat", "image": "https://example.org/cat.png", "images": []}
    assert parse_row(row, "prompt-completion", "rows.jsonl:1").completion == "a cat"
