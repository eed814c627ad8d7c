"""``data.validation``: the held-out loss during training, the kept step, early stopping, and resuming."""

from __future__ import annotations

import json
import math
import signal
import statistics as stats
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import wilcoxon

from ingle import flow
from ingle.config import load_run
from ingle.errors import ConfigError, Interrupted
from ingle.events import Event, Saved, Step, Validated
from ingle.report.results import RunReport
from ingle.training.folder import RunFolder
from tests.e2e.conftest import write_config

#: Full fine-tuning on a few rows, which soon overfits.
OVERFITTING = (
    *("--adapter.kind=none", "--base.format=none", "--optim.lr=1e-2", "--optim.schedule=constant"),
    *("--train.num_steps=14", "--train.save_every=1", "--train.keep_checkpoints=1"),
    *("--train.keep_best", "--train.early_stopping={patience: 3, min_delta: 0}", "--evaluate={every: 2}"),
)
#: Figures that differ from run to run.
MEASURED = {"tokens_per_s", "peak_memory_bytes"}

Train = Callable[..., RunReport]


def _ignore(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contains the config of all runs."""
    folder = tmp_path_factory.mktemp("validation")
    write_config(folder, tiny_model, tiny_data)
    return folder


@pytest.fixture(scope="module")
def train(folder: Path, tiny_data: Path) -> Train:
    """Trains on a few rows, and validates on others."""

    def run(name: str, *flags: str, sink: Callable[[Event], None] = _ignore) -> RunReport:
        sources = f"--data.sources=[{{path: {tiny_data}/train.jsonl, limit: 6}}]"
        words = [sources, f"--output={folder / name}", *flags]
        return flow.finetune(load_run(folder / "config.yaml", words).run, sink)

    return run


@pytest.fixture(scope="module")
def validated(tiny_data: Path) -> str:
    return f"--data.validation={tiny_data}/held-out.jsonl"


@pytest.fixture(scope="module")
def overfitted(train: Train, validated: str) -> RunReport:
    return train("overfitted", validated, *OVERFITTING)


def _rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def test_the_best_step_is_kept_and_the_report_says_why(overfitted: RunReport, folder: Path) -> None:
    run, found = folder / "overfitted", overfitted.validation
    assert found is not None
    losses = {point.step: point.loss for point in found.history}
    best = min(losses, key=lambda step: losses[step])
    assert found.best_step == found.kept_step == best
    assert 0 < best < overfitted.num_steps == best + 6 < 14, "three validations without a gain end the run"
    assert found.stopped_early and found.overfit
    assert losses[overfitted.num_steps] > losses[best]
    assert f"Step {best} was kept" in found.verdict and "overfitting" in found.verdict
    assert found.verdict in (run / "report.html").read_text()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-{best}", f"step-{best + 6}"}
    masters = load_file(run / "checkpoints" / f"step-{best}" / "optimizer.safetensors")
    for name, weight in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(weight, masters[f"master.{name}"]), "the result has the weights of the kept step"


def test_metrics_contain_each_validation_once(overfitted: RunReport, folder: Path) -> None:
    assert overfitted.validation is not None
    rows = _rows(folder / "overfitted")
    found = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert found == {point.step: point.loss for point in overfitted.validation.history}
    assert list(found) == list(range(0, overfitted.num_steps + 1, 2))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, overfitted.num_steps + 1))


def test_a_run_that_is_stopped_and_killed_at_every_point_ends_with_the_same_bytes(
    train: Train, validated: str, overfitted: RunReport, folder: Path
) -> None:
    """Between a step and its validation, within a validation, and between a validation and its checkpoint."""
    report = None
    for attempt in count():
        events = 0

        def interrupt(event: Event) -> None:
            nonlocal events
            events += isinstance(event, Step | Validated | Saved)
            if events == 3 + attempt % 3:  # noqa: B023 - called in this round only
                events += 1
                if attempt % 2:  # noqa: B023
                    signal.raise_signal(signal.SIGTERM)
                else:
                    raise ZeroDivisionError

        try:
            report = train("interrupted", validated, *OVERFITTING, sink=interrupt)
            break
        except (Interrupted, ZeroDivisionError):
            pass
    assert attempt >= 4
    assert report is not None and report.validation == overfitted.validation
    run, expected = folder / "interrupted", folder / "overfitted"
    assert _rows(run) == _rows(expected)
    for file in ("model/model.safetensors", f"checkpoints/step-{report.num_steps}/selection.safetensors"):
        assert (run / file).read_bytes() == (expected / file).read_bytes()
    states = [
        json.loads((folder / f"checkpoints/step-{report.num_steps}/state.json").read_text())["states"]
        for folder in (run, expected)
    ]
    assert states[0] == states[1]


def test_a_stop_during_the_samples_of_a_validation_saves_the_step(
    train: Train, validated: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Event] = []

    def stop(*arguments: object) -> dict[str, float]:
        if any(isinstance(event, Validated) for event in found):
            signal.raise_signal(signal.SIGINT)
        return {}

    monkeypatch.setattr(flow, "score_samples", stop)
    with pytest.raises(Interrupted):
        train("asked", validated, "--evaluate.every=2", "--train.save_every=0", sink=found.append)
    assert [event.step for event in found if isinstance(event, Validated)] == [0], "it did not wait for the samples"
    assert RunFolder(folder / "asked").last_step() == 2


def test_validations_do_not_change_the_training(train: Train, validated: str, folder: Path) -> None:
    """Neither the weights nor the importance matrix, with dropout and answers to samples at the same points."""
    flags = ("--train.num_steps=4", "--evaluate.num_samples=2", "--train.imatrix")
    train("plain", *flags)
    report = train("observed", *flags, validated, "--evaluate.every=1", "--evaluate.num_validation_samples=2")
    assert report.validation is not None and len(report.validation.history) == 5
    assert {"chrf", "exact_match", "bits_per_byte"} == report.validation.history[0].metrics.keys()
    for file in ("adapter/adapter_model.safetensors", "imatrix.gguf"):
        assert (folder / "plain" / file).read_bytes() == (folder / "observed" / file).read_bytes(), file


def test_a_selecting_run_does_not_continue_with_another_interval(
    train: Train, validated: str, overfitted: RunReport, folder: Path
) -> None:
    (folder / "overfitted" / "report.json").rename(folder / "report.json")
    try:
        with pytest.raises(ConfigError, match=r"evaluate\.every: 2 -> 3"):
            train("overfitted", validated, *OVERFITTING, "--evaluate.every=3")
    finally:
        (folder / "report.json").rename(folder / "overfitted" / "report.json")


@pytest.mark.sweep
def test_the_kept_step_of_the_demo_with_60_rows_is_better_than_the_last_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On rows that neither training nor the choice of the step has seen; two minutes on one core."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    flags = [
        *("--data.sources=[{path: examples/demo/train.jsonl, limit: 60}]", "--data.validation=0.25"),
        *("--train.num_steps=60", "--optim.schedule=constant", "--evaluate.every=6", "--evaluate.metrics=[perplexity]"),
    ]
    losses = []
    for keep_best in ("true", "false"):
        words = [*flags, f"--train.keep_best={keep_best}", f"--output={tmp_path / keep_best}"]
        report = flow.finetune(load_run(root / "examples" / "demo" / "demo.yaml", words).run, _ignore)
        assert report.validation is not None and report.validation.overfit
        assert (report.validation.kept_step < report.num_steps) == (keep_best == "true")
        answers = [json.loads(line) for line in (tmp_path / keep_best / "answers.jsonl").read_text().splitlines()]
        losses.append([math.log(row["scores"]["perplexity"]["tuned"]) for row in answers])
    kept, last = losses
    assert len(kept) == 150
    assert stats.mean(kept) < stats.mean(last)
    assert wilcoxon(kept, last, alternative="less").pvalue < 1e-6
