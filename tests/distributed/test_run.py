"""Complete runs on several ranks: the results of one process, and resumed on any number of ranks."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingle import flow
from ingle.config import load_run
from ingle.errors import Interrupted
from ingle.events import Event, Warned
from ingle.parallel import Mesh
from tests.distributed.ranks import run_ranks
from tests.e2e.conftest import command, environment, tiny_data, tiny_model, write_config

__all__ = ["tiny_data", "tiny_model"]

ADAPTER = "adapter/adapter_model.safetensors"
#: Full fine-tuning; answers are drawn, from one random stream for each sample.
FULL = ("--adapter.kind=none", "--base.format=none", "--evaluate.temperature=0.8", "--evaluate.num_samples=3")


def _train(mesh: Mesh, config: Path, flags: tuple[str, ...]) -> list[str]:
    """Trains; returns the warnings that were reported."""
    events: list[Event] = []
    flow.finetune(load_run(config, list(flags)).run, events.append)
    assert mesh.is_main or not events, "only rank 0 reports"
    return [event.message for event in events if isinstance(event, Warned)]


def _run(config: Path, name: str, world_size: int, *flags: str) -> tuple[Path, list[str]]:
    folder = config.parent / name
    warnings = run_ranks(world_size, _train, config, (f"--output={folder}", *flags))[0]
    return folder, warnings


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _assert_same_run(run: Path, expected: Path, file: str = ADAPTER) -> None:
    """Compares the weights, the answers and the steps of two runs, up to the order of additions."""
    ours, theirs = load_file(run / file), load_file(expected / file)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for row, other in zip(_rows(run / "metrics.jsonl"), _rows(expected / "metrics.jsonl"), strict=True):
        assert (row["step"], row["num_tokens"]) == (other["step"], other["num_tokens"]), "the same samples"
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    answers = {row["origin"]: row for row in _rows(expected / "answers.jsonl")}
    for row in _rows(run / "answers.jsonl"):
        other = answers[row["origin"]]
        assert (row["base"], row["tuned"]) == (other["base"], other["tuned"])
        assert row["scores"]["bits_per_byte"] == pytest.approx(other["scores"]["bits_per_byte"], rel=1e-5)


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("runs"), tiny_model, tiny_data)


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """The run of one process."""
    return _run(config, "alone", 1)[0]


@pytest.fixture(scope="module")
def sharded(config: Path) -> Path:
    """The run of two ranks that share the base."""
    return _run(config, "sharded", 2, "--parallel.kind=fsdp")[0]


@pytest.fixture(scope="module")
def killed(config: Path) -> Path:
    """The same run through the command, killed with all its ranks after a checkpoint."""
    run, log = config.parent / "killed", config.parent / "log"
    words = ("train", config, f"--output={run}", "--parallel.kind=fsdp", "--parallel.num_processes=2")
    with open(log, "wb") as file:
        process = subprocess.Popen(command(*words), stdout=file, stderr=file, env=environment())
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step-3" / "state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        process.kill()
        process.wait()
    while _is_locked(run) and time.monotonic() < deadline:  # until the kernel has ended the ranks
        time.sleep(0.01)
    assert len(_rows(run / "metrics.jsonl")) < 12
    return run


def _is_locked(run: Path) -> bool:
    return subprocess.run(["flock", "--nonblock", run / "run.lock", "true"], check=False).returncode != 0


def test_two_ranks_give_the_adapter_and_the_answers_of_one_process(sharded: Path, alone: Path) -> None:
    _assert_same_run(sharded, alone)
    record = json.loads((sharded / "report.json").read_text())
    assert record["plan"]["strategy"]["kind"] == "zero3"
    assert record["plan"]["measured_peak_bytes"] > 0


def test_killed_ranks_resume_to_the_same_bytes(killed: Path, sharded: Path, tmp_path: Path) -> None:
    run = shutil.copytree(killed, tmp_path / "run")
    again = subprocess.run(
        command("train", "--resume", run), capture_output=True, text=True, timeout=300, env=environment()
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("Finished in") == 1, "rank 0 alone prints"
    assert (run / ADAPTER).read_bytes() == (sharded / ADAPTER).read_bytes()


@pytest.mark.parametrize(("world_size", "kind", "num_samples"), [(1, "fsdp", 8), (3, "zero1", 2)])
def test_another_number_of_ranks_resumes_with_the_same_samples(
    killed: Path, alone: Path, config: Path, world_size: int, kind: str, num_samples: int
) -> None:
    """One of three ranks has no sample to answer."""
    name = f"killed-{world_size}"
    shutil.copytree(killed, killed.with_name(name))
    flags = (f"--parallel.kind={kind}", f"--parallel.num_processes={world_size}")
    run, warnings = _run(config, name, world_size, *flags, f"--evaluate.num_samples={num_samples}")
    assert any(f"began on 2 ranks and resumes on {world_size}" in warning for warning in warnings)
    assert len(_rows(run / "answers.jsonl")) == num_samples
    _assert_same_run(run, alone)


def test_ranks_share_a_gguf_base_with_a_quantized_head(
    config: Path, tiny_model: Path, gguf_of: Callable[[Path, Path, str], Path]
) -> None:
    file = gguf_of(tiny_model, config.parent / "tiny.gguf", "q8_0")
    flags = (f"--model.id={file}", "--base.format=none", "--train.num_steps=2", "--evaluate.num_samples=2")
    expected, _ = _run(config, "gguf-alone", 1, *flags)
    run, _ = _run(config, "gguf-sharded", 2, *flags, "--parallel.kind=fsdp")
    _assert_same_run(run, expected)


def test_full_fine_tuning_writes_the_model_of_one_process(config: Path) -> None:
    expected, _ = _run(config, "full-alone", 1, *FULL)
    run, _ = _run(config, "full-sharded", 2, *FULL, "--parallel.kind=zero2")
    _assert_same_run(run, expected, "model/model.safetensors")
    names = [sorted(file.name for file in (folder / "model").iterdir()) for folder in (run, expected)]
    assert names[0] == names[1]
    assert (run / "model" / "config.json").read_text() == (expected / "model" / "config.json").read_text()
    assert not list(run.glob("*.partial-*"))


def test_ranks_keep_the_step_that_one_process_keeps(config: Path, tiny_data: Path) -> None:
    """The weights of the kept step are read back into shards; the last steps overfit."""
    flags = (
        *("--adapter.kind=none", "--base.format=none", "--optim.lr=1e-2", "--optim.schedule=constant"),
        f"--data.sources=[{{path: {tiny_data}/train.jsonl, limit: 6}}]",
        *(f"--data.validation={tiny_data}/held-out.jsonl", "--evaluate={every: 2}", "--train.keep_best"),
    )
    expected, _ = _run(config, "kept-alone", 1, *flags)
    run, _ = _run(config, "kept-sharded", 2, *flags, "--parallel.kind=fsdp")
    ours, theirs = (json.loads((folder / "report.json").read_text())["validation"] for folder in (run, expected))
    assert ours["kept_step"] == theirs["kept_step"] < 12
    assert [row["loss"] for row in ours["history"]] == pytest.approx(
        [row["loss"] for row in theirs["history"]], rel=1e-3
    )
    found, wanted = (load_file(folder / "model" / "model.safetensors") for folder in (run, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-3)


def _stop(mesh: Mesh, config: Path, flags: tuple[str, ...], victim: int) -> str:
    """Trains until one rank is asked to stop; returns how this rank's call ended."""
    if mesh.dist_rank == victim:
        flow.take_step = _stopping(flow.take_step)
    try:
        flow.finetune(load_run(config, list(flags)).run)
    except Interrupted as stopped:
        return str(stopped)
    return "finished"


def _stopping(take_step: Any) -> Any:
    def step(*arguments: Any, **options: Any) -> Any:
        result = take_step(*arguments, **options)
        if options["step"] == 2:
            signal.raise_signal(signal.SIGTERM)
        return result

    return step


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(config: Path) -> None:
    run = config.parent / "stopped"
    for message in run_ranks(2, _stop, config, (f"--output={run}", "--parallel.kind=zero1"), 1):
        assert f"step 2 is saved in {run / 'checkpoints' / 'step-2'}" in message
    assert (run / "checkpoints" / "step-2" / "state.json").is_file()
