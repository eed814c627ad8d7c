"""The run folder knows a run that never began from files that are none of its business."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import DataConfig, ModelConfig, Run, Source
from ingle.errors import ConfigError
from ingle.training.folder import RunFolder


def _run(folder: Path) -> Run:
    return Run(model=ModelConfig(id="m"), data=DataConfig(sources=(Source(path="train.jsonl"),)), output=str(folder))


def test_a_run_killed_while_its_first_file_was_written_can_begin_anew(tmp_path: Path) -> None:
    for name in ("run.lock", "run.yaml.partial-4711"):
        (tmp_path / name).write_text("")
    folder = RunFolder(tmp_path)
    assert folder.state(_run(tmp_path)) == "new"
    folder.begin(_run(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock", "run.yaml"]


def test_half_written_results_are_cleared_away(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(_run(tmp_path))
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors.partial-1").write_text("half")
    (tmp_path / "report.json.partial-1").write_text("half")
    (tmp_path / "model.partial-1").mkdir()
    folder.begin(_run(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", "run.yaml"]


@pytest.mark.parametrize("name", ["notes.txt", "thesis.partial-1"])
def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunFolder(tmp_path).state(_run(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"status": "fin', '{"status": "failed"}'])
def test_a_damaged_report_is_no_finished_run(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(_run(tmp_path))
    (folder.checkpoints / "step-1").mkdir(parents=True)
    folder.report.write_text('{"status": "finished"}')
    assert folder.state(_run(tmp_path)) == "finished"
    folder.report.write_text(content)
    assert folder.state(_run(tmp_path)) == "started"


def test_other_options_are_taken_until_something_is_trained(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(_run(tmp_path))
    folder.base_evaluation.write_text("{}")
    other = _run(tmp_path).model_copy(update={"seed": 1})
    assert folder.state(other) == "new"
    folder.begin(other)
    assert folder.load_run().seed == 1
    assert not folder.base_evaluation.exists()
    (folder.checkpoints / "step-0").mkdir(parents=True)
    assert folder.state(other) == "started"
    with pytest.raises(ConfigError, match="seed: 1 -> 0"):
        folder.state(_run(tmp_path))
