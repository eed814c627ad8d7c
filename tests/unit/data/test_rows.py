"""What is reported of a data file without a model."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import pytest
from rich.console import Console

from ingle.cli.exit_status import run_command
from ingle.config.data import SUFFIXES
from ingle.data.inspection import inspect_rows
from ingle.data.readers import known_suffixes
from ingle.errors import DataError
from ingle.report.data_tables import render_rows


def draw(report) -> str:
    buffer = io.StringIO()
    render_rows(report, Console(file=buffer, width=100))
    return buffer.getvalue()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_told_from_its_rows_alone(tmp_path):
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (1, 5, 9, 9)] + [{"prompt": "x", "completion": " "}]
    path = write(tmp_path / "a.jsonl", rows)
    report = inspect_rows(str(path))
    assert (report.rows, report.layouts, report.columns) == (5, {"prompt-completion": 5}, ("prompt", "completion"))
    assert (report.characters.min, report.characters.max, report.characters.median) == (2, 11, 7)
    assert report.problems == (
        f"1 row with an empty answer or text (first {path}:5).",
        "1 of 5 rows is an exact duplicate.",
    )
    text = draw(report)
    assert "--model" in text and "No problems" not in text
    assert json.loads(json.dumps(asdict(report)))["rows"] == 5


def test_the_command_takes_a_bare_file(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": "one"}])
    assert run_command(["data", "inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"] == {"text": 1}
    assert run_command(["data", "inspect", str(path), "--data.max_seq_len=8"]) == 2
    assert f"ingle data inspect {path} --model PATH_OR_ID" in capsys.readouterr().err


def test_several_files_may_have_several_layouts(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "one"}])
    write(
        tmp_path / "b.jsonl",
        [
            {"messages": [{"role": "user", "content": "hi"}]},
            {"text": "x", "messages": [{"role": "user", "content": "ho"}]},
        ],
    )
    report = inspect_rows(str(tmp_path))
    assert report.layouts == {"text": 1, "messages": 2}
    assert report.problems == (f"2 rows without an assistant turn (first {tmp_path / 'b.jsonl'}:1).",)
    assert [role for role, _ in report.previews[1].parts] == ["user"]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "columns: {prompt: prompt, completion: chosen}"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "columns: {prompt: question, completion: chosen}"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": []}, "columns: {messages: chosen}"),
        ({"chosen": "Human: a", "rejected": "Human: b"}, "columns: {text: chosen}"),
    ],
)
def test_preferences_are_refused_with_a_way_out(tmp_path, row, columns):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match="looks like preference data") as caught:
        inspect_rows(str(path))
    assert columns in str(caught.value.fix)
    assert caught.value.where == f"{path}:1"


def test_the_suffixes_of_configs_are_those_that_can_be_read():
    assert known_suffixes() == SUFFIXES
