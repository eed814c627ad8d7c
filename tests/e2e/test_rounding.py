"""Runs that train through the rounding of their merge: equal bytes after a resume, and the merged weights they use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle import adapters, assembly, flow, inference
from ingle.adapters import merged_planes
from ingle.config import load_run
from ingle.events import Event, Saved, Step
from ingle.report.results import RunReport

MERGE_AWARE = ("--base.format=q4_0", "--adapter.merge_aware.fraction=0.5")
QA_LORA = ("--base.format=q5_1", "--adapter.kind=qa_lora", "--adapter.train_rounding=true")


class Crash(Exception):
    """Stops a run."""


def train(config: Path, output: Path, *flags: str, crash: Any = None) -> RunReport:
    def sink(event: Event) -> None:
        if crash is not None and crash(event):
            raise Crash

    run = load_run(config, [*flags, f"--output={output}"]).run
    return flow.finetune(run, sink)


def weights(output: Path) -> bytes:
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("flags", [MERGE_AWARE, QA_LORA], ids=["merge-aware", "qa_lora"])
def test_a_resumed_run_ends_in_the_same_bytes_wherever_it_stopped(
    flags: tuple[str, ...], config: Path, tmp_path: Path
) -> None:
    """The switch is before step 7 and checkpoints are made at 3, 6, 9 and 12."""
    complete = train(config, tmp_path / "complete", *flags)
    stops = {
        "before": lambda event: isinstance(event, Step) and event.step == 5,
        "across": lambda event: isinstance(event, Step) and event.step == 8,
        "after": lambda event: isinstance(event, Step) and event.step == 11,
        "trained": lambda event: isinstance(event, Saved) and event.kind == "adapter",
    }
    for name, stop in stops.items():
        output = tmp_path / name
        with pytest.raises(Crash):
            train(config, output, *flags, crash=stop)
        again = train(config, output, *flags)
        assert weights(output) == weights(tmp_path / "complete"), name
        assert again.metrics == complete.metrics, name


@pytest.mark.parametrize("flags", [MERGE_AWARE, QA_LORA], ids=["merge-aware", "qa_lora"])
def test_evaluation_and_opening_use_the_weights_that_will_be_served(
    flags: tuple[str, ...], config: Path, tmp_path: Path
) -> None:
    report = train(config, tmp_path / "run", *flags)
    rounding = report.rounding
    assert rounding["formats"] == [flags[0].rpartition("=")[2]]
    assert rounding["first_step"] == (7 if flags is MERGE_AWARE else 1)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["rounding"] == rounding
    assert "Tuned answers" in (tmp_path / "run" / "report.html").read_text()
    engine = inference.open_model(str(tmp_path / "run"))
    served = inference.open_model(str(tmp_path / "run"), base_only=True)
    for name, layer in adapters.lora_modules(engine.model).items():
        served.model.get_submodule(name).assign(merged_planes(layer))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = engine.model(ids).logits, served.model(ids).logits
    assert torch.equal(ours, theirs)
    # The same from the adapter's folder alone, which records the format of its base.
    alone = inference.open_model(str(tmp_path / "run" / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(alone.model(ids).logits.float(), ours, rtol=5e-2, atol=5e-2)


def test_the_base_is_the_same_after_training(config: Path, tmp_path: Path) -> None:
    run = load_run(config, [*MERGE_AWARE, f"--output={tmp_path}/run"]).run
    train(config, tmp_path / "run", *MERGE_AWARE, "--evaluate=null")
    parts = assembly.assemble(run, lambda event: None)
    identity = adapters.read_record(tmp_path / "run" / "adapter").identity
    assert identity is not None and parts.identity == identity
