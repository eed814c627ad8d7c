"""A run that started with relative paths is opened, resumed and moved from other folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ingle import flow, inference
from ingle.config import load_run
from ingle.errors import ConfigError
from ingle.events import Event, Warned
from ingle.training.folder import RunFolder

CONFIG = """\
model: {id: base, dtype: float32}
adapter: {rank: 2}
data: {sources: [train.jsonl], max_seq_len: 64}
train: {num_steps: 2, global_batch_size: 2, save_every: 1}
output: runs/x
"""


@pytest.fixture
def home(tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose config names everything relatively; the current folder."""
    folder = tmp_path / "home"
    shutil.copytree(tiny_model, folder / "base")
    shutil.copy(tiny_data / "train.jsonl", folder)
    (folder / "config.yaml").write_text(CONFIG)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    return folder


def _rerun(config: str, *flags: str) -> list[Event]:
    events: list[Event] = []
    flow.finetune(load_run(Path(config), flags).run, events.append)
    return events


def test_a_run_is_found_again_from_anywhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow.finetune(load_run(Path("config.yaml")).run)
    stored = RunFolder(Path("runs/x")).load_run()
    assert (stored.model.id, stored.paths_from) == ("base", str(home))

    monkeypatch.chdir(home.parent / "elsewhere")
    for path in ("../home/runs/x", "../home/runs/x/adapter"):
        assert inference.open_model(path).generate(["1 plus"], max_new_tokens=1)
    # A step more, as if it had been stopped: what is stored stays as it was typed.
    (home / "runs/x/report.json").unlink()
    flow.resume(Path("../home/runs/x"))
    again = RunFolder(home / "runs/x").load_run()
    assert (again.model.id, again.paths_from) == ("base", str(home))
    # The same command from here names the same files, so it is the same run.
    events = _rerun("../home/config.yaml", f"--output={home}/runs/x")
    assert any(isinstance(event, Warned) and "finished" in event.message for event in events)

    # The project moves.
    moved = home.rename(home.parent / "moved")
    monkeypatch.chdir(moved)
    (moved / "runs/x/report.json").unlink()
    flow.finetune(load_run(Path("config.yaml")).run)
    assert RunFolder(Path("runs/x")).load_run().paths_from == str(moved)
    moved.rename(home)
    monkeypatch.chdir(home.parent / "elsewhere")
    assert inference.open_model(str(home / "runs/x")).generate(["1 plus"], max_new_tokens=1)


def test_another_file_of_the_same_name_is_another_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow.finetune(load_run(Path("config.yaml")).run)
    elsewhere = home.parent / "elsewhere"
    shutil.copy("train.jsonl", elsewhere)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ConfigError, match="other options"):
        _rerun("../home/config.yaml", f"--output={home}/runs/x")


def test_notes_from_loading_an_adapter_are_warnings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingle import adapters

    flow.finetune(load_run(Path("config.yaml")).run)
    load, events = adapters.load_adapter, []  # type: ignore[var-annotated]

    def load_and_note(*given, **options):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return replace(load(*given, **options), notes=("lm_head keeps its own weight",))

    monkeypatch.setattr(adapters, "load_adapter", load_and_note)
    inference.open_model("runs/x", sink=events.append)
    assert [event.message for event in events if isinstance(event, Warned)] == ["lm_head keeps its own weight"]
