from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import load_run, load_task
from ingle.config.paths import find_path, locate_paths, move_paths, resolved_paths
from ingle.config.run import Run

NAMES = ("models/base", "models/tokenizer", "template.jinja", "start", "train.jsonl", "held-out.jsonl")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with every file that the run names."""
    for name in NAMES:
        (tmp_path / "home" / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "home"


def _run(**update: object) -> Run:
    return Run.model_validate(
        {
            "model": {"id": "models/base", "tokenizer": "models/tokenizer", "chat_template": "template.jinja"},
            "adapter": {"kind": "lora", "path": "start"},
            "data": {"sources": ["train.jsonl", "*.jsonl", "owner/hub-data"]},
            "evaluate": {"sources": ["held-out.jsonl"]},
            "output": "runs/x",
            **update,
        }
    )


def _paths(run: Run) -> list[str | None]:
    assert run.adapter.kind == "lora" and run.evaluate is not None
    model = [run.model.id, run.model.tokenizer, run.model.chat_template]
    return [*model, run.adapter.path, *(source.path for source in (*run.data.sources, *run.evaluate.sources))]


def test_paths_are_found_from_the_folder_of_the_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = _run(paths_from=str(home))
    monkeypatch.chdir(home)
    assert locate_paths(typed) == typed
    monkeypatch.chdir(home.parent / "elsewhere")
    expected = [*NAMES[:5], "*.jsonl", "held-out.jsonl"]
    found = _paths(locate_paths(typed))
    assert found.pop(-2) == "owner/hub-data"  # exists nowhere: a hub id
    assert found == [str(home / name) for name in expected]


def test_the_current_folder_wins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.parent / "elsewhere")
    Path("train.jsonl").touch()
    assert find_path("train.jsonl", home) == "train.jsonl"
    assert find_path("held-out.jsonl", None, home) == str(home / "held-out.jsonl")


def test_resolved_paths_are_equal_for_the_same_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.parent / "elsewhere")
    typed, other = _run(paths_from=str(home)), _run(model={"id": "../home/models/base"}, paths_from=str(home))
    assert resolved_paths(typed).model.id == resolved_paths(other).model.id == str(home / "models/base")
    Path("train.jsonl").touch()  # a different file of the same name
    assert resolved_paths(typed).data.sources[0].path == str(home / "train.jsonl")
    assert resolved_paths(_run()).data.sources[0].path == str(Path("train.jsonl").resolve())


def test_a_moved_repository_is_found_from_its_run_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "runs/x").mkdir(parents=True)
    monkeypatch.chdir(home.parent / "elsewhere")
    gone = _run(paths_from=str(home.parent / "former"))
    assert locate_paths(move_paths(gone, home / "runs/x")).model.id == str(home / "models/base")
    assert move_paths(gone, home / "models") == gone  # another folder: `output` does not lead back
    still_there = _run(paths_from=str(home))
    assert move_paths(still_there, home.parent / "copy/runs/x") == still_there


def test_a_stored_config_runs_and_scores_again_from_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = home.parent / "stored.yaml"
    stored.write_text(
        f"model: {{id: models/base}}\ndata: {{sources: train.jsonl}}\nevaluate: {{sources: held-out.jsonl}}\n"
        f"output: runs/x\npaths_from: {home}\n"
    )
    monkeypatch.chdir(home.parent / "elsewhere")
    run = load_run(stored).run
    assert (run.model.id, run.data.sources[0].path) == (str(home / "models/base"), str(home / "train.jsonl"))
    assert run.paths_from is None  # new paths are relative to the current folder
    assert load_task(stored).sources[0].path == str(home / "held-out.jsonl")


def test_remote_code_in_a_local_folder_needs_no_revision(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingle.config.rules import find_violations

    monkeypatch.chdir(home.parent / "elsewhere")
    run = _run(model={"id": "models/base", "trust_remote_code": True})
    assert [problem.where for problem in find_violations(run)] == ["model.trust_remote_code, model.revision"]
    assert find_violations(run.model_copy(update={"paths_from": str(home)})) == []
