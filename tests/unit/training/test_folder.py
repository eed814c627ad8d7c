"""The run folder knows a run that never began from files that are none of its business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingle.config import DataConfig, ModelConfig, Run, Source
from ingle.config.objective import Classify
from ingle.config.parallel import ParallelConfig
from ingle.errors import CheckpointError, ConfigError
from ingle.planning import Strategy
from ingle.training.folder import RunFolder, differences, with_names


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
    with pytest.raises(ConfigError, match="is not empty and contains no run"):
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


def test_a_run_that_did_not_begin_leaves_neither_lock_nor_folders(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("precious")
    for folder in (theirs, tmp_path / "new" / "run"):
        with pytest.raises(ZeroDivisionError), RunFolder(folder).locked():
            raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "theirs"]


def test_the_outlook_says_what_starting_would_do(tmp_path: Path) -> None:
    folder, run = RunFolder(tmp_path / "run"), _run(tmp_path / "run")
    assert "new run would start" in folder.outlook(run)
    folder.begin(run)
    for step in (3, 12):
        (folder.checkpoints / f"step-{step}").mkdir(parents=True)
    assert "resume from checkpoints/step-12; 12 steps are done" in folder.outlook(run)
    folder.report.write_text('{"status": "finished"}')
    assert "is finished" in folder.outlook(run)
    with pytest.raises(ConfigError, match="contains a finished run with other options"):
        folder.outlook(run.model_copy(update={"seed": 1}))


def test_options_that_a_finished_run_ignores_are_named(tmp_path: Path) -> None:
    folder, run = RunFolder(tmp_path / "run"), _run(tmp_path / "run")
    folder.begin(run)
    assert folder.ignored(run) == []
    train = run.train.model_copy(update={"save_every": 5})
    assert folder.ignored(run.model_copy(update={"train": train})) == ["train.save_every: null -> 5"]


def test_a_folder_that_is_no_run_leads_to_the_one_that_was_meant(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    RunFolder(run).begin(_run(run))
    (run / "checkpoints" / "step-3").mkdir(parents=True)
    for wrong in (run.parent, run.with_name("demp"), run / "checkpoints" / "step-3"):
        with pytest.raises(CheckpointError, match="is not a run folder") as caught:
            RunFolder(wrong).load_run()
        assert caught.value.fix == f"did you mean {run}?"


def test_the_strategy_of_the_last_start_is_kept_for_the_next_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load_strategy() is None
    strategy = Strategy("zero2", world_size=2, shard_size=2, micro_batch_size=3, recompute=True)
    folder.plan.write_text(json.dumps({"num_steps": 7, "strategy": strategy.to_dict()}))
    assert folder.load_strategy() == strategy
    folder.plan.write_text('{"strategy": {"kind": "zero2", "unknown": 1}}')
    assert folder.load_strategy() is None


def test_a_run_may_resume_with_other_options_of_parallel(tmp_path: Path) -> None:
    run = _run(tmp_path)
    more = run.model_copy(update={"parallel": ParallelConfig(kind="fsdp", num_processes=3)})
    assert differences(run, more) == []


def test_a_run_continues_with_the_labels_that_it_found(tmp_path: Path) -> None:
    given = _run(tmp_path).model_copy(update={"objective": Classify(kind="classify")})
    named = Classify(kind="classify", labels=("bad", "good"), problem="single")
    began = given.model_copy(update={"objective": named})
    assert with_names(given, began) == began and differences(began, given) == []
    other = given.model_copy(update={"objective": named.model_copy(update={"labels": ("good", "bad")})})
    assert with_names(other, began) == other
    assert [change.split(":")[0] for change in differences(began, other)] == [
        "objective.labels.0",
        "objective.labels.1",
    ]


def test_one_relative_path_from_two_folders_is_shown_in_full(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("{}")
        runs.append(_run(tmp_path).model_copy(update={"paths_from": str(tmp_path / name)}))
    (change,) = differences(*runs)
    assert change == f"data.sources.0.path: {tmp_path}/one/train.jsonl -> {tmp_path}/two/train.jsonl"
