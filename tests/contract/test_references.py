"""Runs with a reference: it is the function that training began with, wherever that was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ingle import scoring
from ingle.assembly import assemble, prepare
from ingle.config.evaluate import TaskConfig
from ingle.config.run import Run
from ingle.errors import ConfigError, Interrupted
from ingle.events import Event, Warned
from ingle.flow import finetune
from ingle.margins import QUANTILES, measure_margins
from ingle.objectives.preferences import PreferenceObjective
from ingle.report.results import Comparison
from tests.axis import POINTS, Point, config_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


def train(folder: Path, name: str, point: str = "dpo, packed", **changes: Any) -> Path:
    """Makes a run, and returns its folder."""
    config = config_of(folder, POINTS[point])
    for section, options in changes.items():
        config[section] = options if section in ("objective", "adapter") else config.get(section, {}) | options
    config["output"] = str(folder / name)
    finetune(Run.model_validate(config))
    return folder / name


def steps(run: Path) -> list[dict[str, Any]]:
    """The metrics of the steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "rewards/margin" in line]


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    """An adapter that supervised training moved away from its base."""
    return train(folder, "tuned", "sft, packed, dora", adapter={"kind": "lora", "rank": 2}) / "adapter"


def test_an_adapter_that_continues_another_one_is_compared_with_it(folder: Path, tuned: Path) -> None:
    run = train(folder, "continued", adapter={"kind": "lora", "rank": 2, "path": str(tuned)})
    start = json.loads((run / "start.json").read_text())
    assert start["adapter equals its start"]["measured"] == start["log-ratio"]["measured"] == 0.0
    first, *_, last = steps(run)
    assert abs(first["rewards/margin"]) < 1e-6 < abs(last["rewards/margin"])
    assert start["preference"]["expected"] == pytest.approx(math.log(2))


def test_what_training_began_with_is_the_base_of_evaluations(folder: Path, tuned: Path) -> None:
    task = {"sources": [{"path": str(folder / "sft.jsonl")}], "metrics": ["bits_per_byte"], "num_samples": 5}
    adapter = {"kind": "lora", "rank": 2, "path": str(tuned)}
    run = train(folder, "evaluated", adapter=adapter, evaluate=task)
    report = json.loads((run / "report.json").read_text())
    found = [report["metrics"]["bits_per_byte"][side] for side in ("base", "tuned")]
    (before,) = scoring.evaluate(str(tuned.parent), [TaskConfig.model_validate(task)])
    (after,) = scoring.evaluate(str(run), [TaskConfig.model_validate(task)])
    assert isinstance(before, Comparison) and isinstance(after, Comparison)
    assert before.metrics["bits_per_byte"].tuned == pytest.approx(found[0], rel=1e-6)
    again = after.metrics["bits_per_byte"]
    assert [again.base, again.tuned] == pytest.approx(found, rel=1e-6) and found[0] != found[1]


def test_an_adapter_may_train_through_rounding_in_its_last_steps(folder: Path, tuned: Path) -> None:
    adapter = {"kind": "lora", "rank": 2, "path": str(tuned), "merge_aware": {"format": "q8_0", "fraction": 0.5}}
    run = train(folder, "rounded", adapter=adapter)
    assert json.loads((run / "start.json").read_text())["log-ratio"]["measured"] == 0.0
    assert steps(run)[-1]["rewards/margin"] != 0.0


def test_full_fine_tuning_takes_its_reference_before_the_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INGLE_CACHE", str(folder / "cache"))
    changes: dict[str, Any] = {"adapter": {"kind": "none"}, "objective": {"kind": "kto"}, "optim": {"lr": 1e-3}}
    parts = iter([PreferenceObjective._references])  # of the first step only

    def stop_after_one(*arguments: Any) -> Any:
        compute = next(parts, None)
        if compute is None:
            raise KeyboardInterrupt
        return compute(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(PreferenceObjective, "_references", stop_after_one)
        train(folder, "full", **changes)
    assert list((folder / "cache" / "references").glob("*/*.safetensors")), "what was computed is kept"
    run = train(folder, "full", **changes)
    assert json.loads((run / "start.json").read_text())["log-ratio"]["measured"] < 1e-5
    assert abs(steps(run)[-1]["rewards/margin"]) > 1e-3
    # A run that resumes has other weights, and computes its reference again if it must.
    shutil.copytree(run, folder / "resumed")
    for name in ("model", "checkpoints/step-4", "report.json"):
        path = folder / "resumed" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / "cache" / "references")
    resumed = train(folder, "resumed", **changes)
    files = [each / "model" / "model.safetensors" for each in (run, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_margins_are_those_of_the_model_that_training_begins_with(folder: Path) -> None:
    config = config_of(folder, Point("llama", "packed", {"kind": "simpo"}, {"adapter": {"kind": "none"}}))
    run = Run.model_validate(config | {"data": config["data"] | {"validation": None}})
    found = measure_margins(run, 100, print)
    dataset = prepare(run, print).dataset
    model = AutoModelForCausalLM.from_pretrained(run.model.id, dtype=torch.float32)
    margins = []
    for row in range(0, len(dataset), 2):
        sums = []
        for document in (row, row + 1):
            sample = dataset.sample(document)
            with torch.no_grad():
                logps = model(torch.from_numpy(sample.input_ids)[None].long()).logits[0].log_softmax(-1)
            places = np.flatnonzero(sample.labels >= 0)
            sums.append(float(logps[places - 1, sample.labels[places]].sum()))
        margins.append(sums[0] - sums[1])
    assert found.pairs == len(margins)
    assert found.quantiles == pytest.approx(np.quantile(margins, QUANTILES), abs=1e-4)
    assert found.accuracy[0] == np.mean(np.array(margins) > 0)


def test_a_model_that_cannot_share_prompts_repeats_them_and_says_so(folder: Path) -> None:
    told: list[Event] = []
    point = Point("longt5", "rows", {"kind": "simpo", "gamma": 0.5})
    assemble(Run.model_validate(config_of(folder, point)), told.append)
    messages = [event.message for event in told if isinstance(event, Warned)]
    assert "Prompts are computed again for each answer: it takes documents in padded rows." in messages
    notes = [event.message for event in told if isinstance(event, Warned) and event.is_note]
    assert len(notes) == 1 and "This run differs: gamma 0.5." in notes[0]
    point.objective["share_prompts"] = True  # type: ignore[index]
    with pytest.raises(ConfigError, match="in padded rows"):
        assemble(Run.model_validate(config_of(folder, point)), told.append)
