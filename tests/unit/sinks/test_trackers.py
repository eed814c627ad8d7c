from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ingle.errors import DependencyError
from ingle.events import Evaluated, Event, Finished, Saved, Started, Step, Validated
from ingle.sinks import TensorBoard, Wandb
from tests.stored_results import COMPARISON, REPORT


def make_events(output: Path) -> list[Event]:
    return [
        Started({"output": str(output)}, {}, {}, 0, 2),
        Step(1, 2.0, 10, 5.0, 1e-3, 1.0, 100, 0.5, {"accuracy": 0.5}),
        Saved(1, "x", "checkpoint"),
        Step(2, float("nan"), 20, 5.0, 1e-3, 1.0, 100, 1.0),
        Validated(2, 2.25, 2, 2.25, metrics={"chrf": 30.0}),
        Evaluated(2, COMPARISON),
        Finished(2, REPORT),
    ]


@pytest.mark.parametrize(
    ("module", "make", "extra"),
    [
        ("tensorboard.summary", lambda path: TensorBoard(path), "[tensorboard]"),
        ("wandb", lambda path: Wandb("p"), "[wandb]"),
    ],
)
def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, make: Any, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError) as caught:
        make(tmp_path)
    assert extra in (caught.value.fix or "")
    assert extra.strip("[]") in (caught.value.where or "")


def test_tensorboard_gets_scalars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[tuple[str, float, int]] = []
    closed: list[bool] = []

    def make_writer(folder: str) -> SimpleNamespace:
        assert folder == str(tmp_path / "tb")
        return SimpleNamespace(add_scalar=lambda *entry: written.append(entry), close=lambda: closed.append(True))

    monkeypatch.setitem(sys.modules, "tensorboard.summary", SimpleNamespace(Writer=make_writer))
    sink = TensorBoard(tmp_path / "tb")
    for event in make_events(tmp_path):
        sink(event)
    assert ("train/loss", 2.0, 1) in written and ("train/accuracy", 0.5, 1) in written
    assert not [entry for entry in written if entry[0] == "train/loss" and entry[2] == 2]  # NaN is no scalar
    assert ("train/validation_loss", 2.25, 2) in written and ("train/validation_chrf", 30.0, 2) in written
    assert ("evaluate/bleu/tuned", COMPARISON.metrics["bleu"].tuned, 2) in written
    assert not [entry for entry in written if entry[0] == "train/step"]
    assert closed == [True]


def test_a_resumed_run_keeps_its_wandb_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []
    finished: list[int] = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((values, step)),
        finish=lambda exit_code: finished.append(exit_code),
        summary={},
    )

    def init(**options: Any) -> Any:
        opened.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        sink = Wandb("project")
        for event in make_events(tmp_path):
            sink(event)
    assert opened[0]["id"] == opened[1]["id"] == (tmp_path / "wandb.id").read_text()
    assert opened[0]["project"] == "project" and opened[0]["resume"] == "allow"
    assert [number for _, number in logged] == [1, 2, 2, 1, 2, 2]
    assert logged[2][0] == {"train/validation_loss": 2.25, "train/validation_chrf": 30.0}
    assert logged[0][0]["train/loss"] == 2.0
    assert run.summary["evaluate/bleu/delta"] == COMPARISON.metrics["bleu"].delta
    assert finished == [0, 0]
