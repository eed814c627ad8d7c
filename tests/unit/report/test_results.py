"""Results and their JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingle.errors import CheckpointError
from ingle.report.results import RunReport, from_dict, to_dict
from ingle.report.run_files import read_report
from tests.stored_results import COMPARISON, REPORT, STORED, SUMMARY


def test_stored_results_are_read_and_dumped_unchanged() -> None:
    for name, result in (("report", REPORT), ("comparison", COMPARISON), ("summary", SUMMARY)):
        assert json.dumps(to_dict(result)) == json.dumps(STORED[name])


def test_a_report_without_evaluation_has_no_keys_for_it() -> None:
    evaluated = ("headline", "verdict", "outcome", "n", "shown", "samples")
    content = {name: value for name, value in STORED["report"].items() if name not in evaluated} | {"metrics": {}}
    report = from_dict(RunReport, content)
    assert report.headline is None
    assert to_dict(report) == content


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"status": "finished"}', b"[" * 100_000])
def test_a_damaged_report_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_report(tmp_path / "report.json")
    assert caught.value.where == str(tmp_path / "report.json")
    assert caught.value.fix
