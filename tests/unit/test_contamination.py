"""Held-out rows in the training data: a warning before the run and a line in its report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ingle.assembly import _find_contamination
from ingle.config import Run
from ingle.data.types import Example
from ingle.events import Warned
from ingle.report.run_details import list_facts
from tests.stored_results import REPORT


@pytest.fixture()
def run(tmp_path: Path) -> Run:
    rows = [{"prompt": f"what is {i}?", "completion": str(i)} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(model={"id": "m"}, data={"sources": str(tmp_path / "t.jsonl")}, output="x")  # type: ignore[arg-type]


def pair(origin: str, prompt: str, completion: str) -> Example:
    return Example(origin, prompt=prompt, completion=completion)


def test_a_run_warns_and_its_report_says_so(run: Run) -> None:
    told: list[Any] = []
    held_out = [pair("h:1", "What is 2?", "two"), pair("h:2", "what is 3?", "3"), pair("h:3", "new", "3")]
    found = _find_contamination(run, held_out, told.append)
    (warning,) = (event for event in told if isinstance(event, Warned))
    assert warning.message.startswith(
        "2 of 3 held-out prompts are in the training data, 1 of them with the same answer"
    )
    assert f"(first h:1 = {run.data.sources[0].path}:3)" in warning.message
    facts = {
        label: (value, note) for label, value, note in list_facts(run, replace(REPORT, contamination=asdict(found)))
    }
    assert facts["Held-out rows in the training data"] == ("2 of 3", "1 with the same answer")


def test_nothing_in_common_is_no_warning(run: Run) -> None:
    told: list[Any] = []
    assert _find_contamination(run, [pair("h:1", "new", "3")], told.append).same_prompt == 0
    assert not any(isinstance(event, Warned) for event in told)
