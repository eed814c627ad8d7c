"""Results that are kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingle.evaluation import SampleText, TaskResult, load_result, save_result
from ingle.evaluation.scorers import Likelihood, Outputs

_RESULT = TaskResult(
    samples=(SampleText("a.jsonl:1", "2 plus 2?", ("4", "four")),),
    outputs=Outputs(answers=("4",), likelihoods=(Likelihood(0.1, 1, 1),)),
    seconds=0.3,
)


def test_a_result_is_kept_for_its_task(tmp_path: Path) -> None:
    save_result(_RESULT, "the task", tmp_path / "x.json")
    assert load_result("the task", tmp_path / "x.json") == _RESULT
    assert load_result("another task", tmp_path / "x.json") is None
    assert load_result("the task", tmp_path / "y.json") is None


@pytest.mark.parametrize(
    ("old", "new"), [(b'"answers": ["4"]', b'"answers": ["5"]'), (b"0.3", b"0.4"), (b"sha256", b"sha"), (b"{", b"")]
)
def test_a_changed_result_is_not_believed(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "x.json"
    save_result(_RESULT, "the task", path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    assert load_result("the task", path) is None


def test_what_nests_too_deeply_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 100_000)
    assert load_result("the task", tmp_path / "x.json") is None
    (tmp_path / "x.json").write_text(json.dumps(["the task"]))
    assert load_result("the task", tmp_path / "x.json") is None
