"""What of a generated text is scored."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ingle.config import Source, TaskConfig
from ingle.evaluation import evaluate_single, runner


@pytest.mark.parametrize(
    "text, references, scored",
    [
        ("four", ["four"], "four"),
        ("<think>\n\n</think>\n\nfour", ["four"], "four"),
        ("<think>\nTwo and two.\n</think>\n\nfour\n</think>", ["4", "four"], "four\n</think>"),
        ("Two and two.\n</think>\nfour", ["four"], "four"),  # the prompt has opened the thoughts
        ("<think>\nTwo and", ["four"], "<think>\nTwo and"),
        ("<think>a</think>four", ["four", "<think>b</think>four"], "<think>a</think>four"),
    ],
)
def test_thoughts_are_not_part_of_the_answer(text: str, references: list[str], scored: str) -> None:
    assert runner.final_answer(text, references) == scored


def test_an_answer_behind_thoughts_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "task.jsonl"
    rows.write_text(json.dumps({"prompt": "two and two?", "completion": "four"}) + "\n")
    answers = [SimpleNamespace(text="<think>\n\n</think>\n\nfour", finish_reason="stop")]
    monkeypatch.setattr(runner, "generate", lambda *args, **options: answers)
    monkeypatch.setattr(runner, "prompt_ids", lambda *args, **options: [1])
    task = TaskConfig(sources=(Source(path=str(rows)),), metrics=("exact_match",))
    result = evaluate_single(SimpleNamespace(config=None), None, task)
    assert result["metrics"]["exact_match"]["value"] == 1.0
    assert result["samples"][0]["answer"] == "four"
