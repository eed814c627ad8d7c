"""Runs of an objective with all phases: the start is proved, every tensor moves, and a resumed run ends the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle import flow, objectives
from ingle.adapters import lora_modules
from ingle.config.run import Run
from ingle.errors import Interrupted, NotTrained, ProofFailed
from ingle.events import Event, Proved, Saved
from ingle.models import Model
from tests.axis import POINTS, config_of
from tests.pairs import PairLoss, PairObjective, make_objective

#: Makes the objective of a run.
Make = Callable[[objectives.Context], PairObjective]


class _Cut(PairLoss):
    """No gradient reaches the adapter of one layer."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        name = next(name for name in lora_modules(model) if name.endswith("1.self_attn.v_proj"))
        model.get_parameter(f"{name}.lora_b").register_hook(torch.zeros_like)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture
def train(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PairObjective]:
    """Trains with an objective over pairs, and keeps a copy of the run after its second step."""
    config = config_of(folder, POINTS["clm, packed"])
    config["data"] = {key: value for key, value in config["data"].items() if key != "validation"}
    made: list[PairObjective] = []

    def copy(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "resumed")

    def run(make: Make, *, resume: bool = False) -> PairObjective:
        def build(run: Run, context: objectives.Context) -> PairObjective:
            made.append(make(context))
            return made[-1]

        monkeypatch.setattr(objectives, "build", build)
        if resume:
            flow.resume(tmp_path / "resumed")
        else:
            flow.finetune(Run.model_validate(config | {"output": str(tmp_path / "whole")}), copy)
        return made[-1]

    return run


def _pairs(context: objectives.Context, kind: type[PairLoss] = PairLoss) -> PairObjective:
    return make_objective(kind(context.model), context.mesh, batch=4, micro=2)


def _records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_has_all_phases_and_resumes_to_the_same_bytes(train: Callable[..., Any], tmp_path: Path) -> None:
    objective = train(_pairs)
    kinds = [kind for kind, _ in objective.calls]
    assert kinds == ["collect", "prepare", "after_step"] * 4
    assert [step for kind, step in objective.calls if kind == "collect"] == [1, 2, 3, 4]
    steps = _records(tmp_path / "whole" / "metrics.jsonl")
    assert all(step.keys() >= {"sft", "rewards/accuracy", "rewards/margin"} and "never" not in step for step in steps)
    assert abs(steps[0]["rewards/margin"]) < 1e-5 < steps[-1]["rewards/margin"]
    (proved,) = (each for each in _records(tmp_path / "whole" / "events.jsonl") if each["event"] == Proved.tag)
    assert proved["checks"] == json.loads((tmp_path / "whole" / "start.json").read_text())
    assert proved["checks"]["preference"]["measured"] == pytest.approx(0.693147, rel=1e-4)

    resumed = train(_pairs, resume=True)
    assert [step for kind, step in resumed.calls if kind == "collect"] == [3, 4]
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_tensor_that_does_not_move_is_named_also_by_a_resumed_run(train: Callable[..., Any], tmp_path: Path) -> None:
    for resume in (False, True):
        with pytest.raises(NotTrained, match=r"2 of .* did not move in the first 4 steps") as refused:
            train(lambda context: _pairs(context, _Cut), resume=resume)
        assert "layers.1.self_attn.v_proj.lora_b" in str(refused.value)
        assert "no gradient reached them" in str(refused.value)
    assert len(_records(tmp_path / "resumed" / "metrics.jsonl")) == 4


def test_a_run_whose_proof_fails_makes_no_step(train: Callable[..., Any], tmp_path: Path) -> None:
    def stale(context: objectives.Context) -> PairObjective:
        objective = _pairs(context)
        objective.shift = 0.1
        return objective

    with pytest.raises(ProofFailed, match="stored log-probabilities"):
        train(stale)
    assert not (tmp_path / "whole" / "metrics.jsonl").exists()
    assert [entry.name for entry in (tmp_path / "whole" / "checkpoints").iterdir()] == ["step-0"]


def test_a_run_stops_with_a_checkpoint_where_the_collection_of_data_is_interrupted(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    class Stopping(PairObjective):
        def collect(self, step: int, relief: Any, sink: Any) -> bool:
            return step < 4

    def make(context: objectives.Context) -> PairObjective:
        objective = _pairs(context)
        objective.__class__ = Stopping
        return objective

    with pytest.raises(Interrupted):
        train(make)
    assert (tmp_path / "whole" / "checkpoints" / "step-3").is_dir()
