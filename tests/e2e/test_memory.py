"""The memory that a plan predicts beside the memory that the run takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Ingle


@pytest.mark.parametrize("flags", [[], ["--adapter.kind=none", "--base.format=none"]], ids=["qlora", "full"])
def test_the_predicted_memory_is_what_is_used(ingle_process: Ingle, tmp_path: Path, flags: list[str]) -> None:
    short = ["--train.num_steps=4", "--data.sources=[{path: examples/demo/train.jsonl, limit: 300}]"]
    done = ingle_process("train", "examples/demo/demo.yaml", f"--output={tmp_path}", "--evaluate=null", *short, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["plan"]["memory"]["total"] == pytest.approx(report["peak_memory_bytes"], rel=0.25)
