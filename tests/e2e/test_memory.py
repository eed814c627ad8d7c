"""The memory that a plan predicts, and the memory that the run takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Ingle


@pytest.mark.parametrize("flags", [[], ["--adapter.kind=none", "--base.format=none"]], ids=["qlora", "full"])
def test_the_predicted_memory_is_what_is_used(ingle_process: Ingle, tmp_path: Path, flags: list[str]) -> None:
    # In the first steps, oneDNN has not compiled all of its products yet.
    short = ["--train.num_steps=12", "--data.sources=[{path: examples/demo/train.jsonl, limit: 300}]"]
    done = ingle_process("train", "examples/demo/demo.yaml", f"--output={tmp_path}", "--evaluate=null", *short, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    plan = report["plan"]
    assert plan["predicted_peak_bytes"] == pytest.approx(plan["measured_peak_bytes"], rel=0.15)
    assert plan["predicted_tokens_per_s"] > 0 and plan["measured_tokens_per_s"] > 0


def test_a_probe_measures_steps_and_corrects_the_plan(ingle_process: Ingle, tmp_path: Path) -> None:
    done = ingle_process(
        "plan", "examples/demo/demo.yaml", f"--output={tmp_path / 'run'}", "--evaluate=null", "--probe", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    probe = answer["probe"]
    assert probe["measured_peak_bytes"] == pytest.approx(probe["predicted_peak_bytes"], rel=0.15)
    change = probe["corrected_total_bytes"] - answer["per_device"]["total_bytes"]
    difference = probe["measured_peak_bytes"] - probe["predicted_peak_bytes"]
    assert change == pytest.approx(difference, rel=0.2)
    faster = probe["measured_tokens_per_s"] / probe["predicted_tokens_per_s"]
    assert probe["corrected_tokens_per_s"] == pytest.approx(answer["tokens_per_s"] * faster)
    assert not (tmp_path / "run").exists()
