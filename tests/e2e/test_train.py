"""``ingle train``: complete, interrupted and refused runs."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ingle import assembly, events, flow
from ingle.config import load_run
from ingle.errors import Interrupted
from tests.e2e.conftest import Ingle, command, environment, write_config

#: Steps in the config of these tests.
NUM_STEPS = 12


def _digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def _metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a finished run; no test changes its folder ``run``."""
    config = write_config(tmp_path_factory.mktemp("finished"), tiny_model, tiny_data)
    done = subprocess.run(command("train", config), capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    return config


def test_a_finished_run_has_all_files_and_metrics(finished: Path) -> None:
    run = finished.parent / "run"
    for name in ("run.yaml", "metrics.jsonl", "report.json", "report.html", "adapter/adapter_config.json"):
        assert (run / name).is_file(), name
    assert (run / "checkpoints" / "step-12").is_dir()
    rows = _metrics(run)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    keys = {"step", "loss", "num_tokens", "tokens_per_s", "lr", "grad_norm", "peak_memory_bytes", "epoch"}
    assert keys <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    report = json.loads((run / "report.json").read_text())
    assert report["status"] == "finished"
    for name in ("chrf", "exact_match", "bits_per_byte"):
        metric = report["metrics"][name]
        assert {"base", "tuned", "delta", "ci95", "p", "n"} <= metric.keys()
        assert metric["n"] == 8
        assert metric["ci95"][0] <= metric["delta"] <= metric["ci95"][1]
    assert report["metrics"]["bits_per_byte"]["delta"] < 0
    assert report["peak_memory_bytes"] > 0
    assert report["tokens_per_s"] > 0
    assert report["wall_s"] > report["train_s"] > 0, "loading and evaluation count too"


def test_a_finished_run_is_not_changed(ingle: Ingle, finished: Path) -> None:
    files = (finished.parent / "run").rglob("*")
    before = {path: path.stat().st_mtime_ns for path in files if path.name != "run.lock"}
    again = ingle("train", finished)
    assert again.returncode == 0
    assert "finished" in again.stdout + again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_options_on_the_same_folder_are_refused(ingle: Ingle, finished: Path) -> None:
    other = ingle("train", finished, "--optim.lr=1e-3")
    assert other.returncode == 2
    assert "optim.lr: 0.005 -> 0.001" in other.stderr
    assert "Traceback" not in other.stderr


def _num_rows(metrics: Path) -> int:
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


@contextmanager
def _running(tmp_path: Path, step: int, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yields a training process that has written ``step`` rows of ``metrics.jsonl``, and kills it at the end.

    A resumed run must add a row first, so that a signal arrives while it trains.
    """
    metrics, log = tmp_path / "run" / "metrics.jsonl", tmp_path / "log"
    step = max(step, min(_num_rows(metrics) + 1, NUM_STEPS))
    with (
        open(log, "wb") as file,
        subprocess.Popen(command("train", *arguments), stdout=file, stderr=file, env=environment()) as process,
    ):
        try:
            deadline = time.monotonic() + 200
            while _num_rows(metrics) < step:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.002)
            yield process
        finally:
            process.kill()


def test_a_run_that_is_killed_repeatedly_ends_with_the_same_bytes(
    ingle_process: Ingle, config: Path, finished: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint, between two of them, and after a resumed run has written one."""
    for step in (1, 4, 8):
        with _running(tmp_path, step, config) as process:
            process.kill()
    again = ingle_process("train", config)
    assert again.returncode == 0, again.stderr
    assert _digest(tmp_path / "run") == _digest(finished.parent / "run")
    assert [row["step"] for row in _metrics(tmp_path / "run")] == list(range(1, NUM_STEPS + 1))


def test_a_signal_saves_a_checkpoint_from_which_the_run_resumes(
    ingle_process: Ingle, config: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for words, step, number in (((config,), 2, signal.SIGINT), (("--resume", run), 7, signal.SIGTERM)):
        with _running(tmp_path, step, *words) as process:
            process.send_signal(number)
            process.wait(timeout=60)
        seen = (tmp_path / "log").read_text()
        assert process.returncode == 130, seen
        assert "--resume" in seen
    saved = max(run.glob("checkpoints/step-*"), key=lambda path: int(path.name.partition("-")[2]))
    before = json.loads((saved / "state.json").read_text())
    again = ingle_process("train", "--resume", run)
    assert again.returncode == 0, again.stderr
    assert _digest(run) == _digest(finished.parent / "run")
    report = json.loads((run / "report.json").read_text())
    assert report["wall_s"] > before["wall_s"] + report["train_s"] - before["train_s"], "time before the interruption"


def test_held_out_rows_in_the_training_data_are_reported(config: Path, tiny_data: Path) -> None:
    seen: list[events.Event] = []
    ready = assembly.prepare(load_run(config, [f"--evaluate.sources=[{tiny_data}/train.jsonl]"]).run, seen.append)
    assert ready.contamination is not None and ready.contamination.same_row == ready.contamination.rows == 8
    assert any(isinstance(event, events.Warned) and "in the training data" in event.message for event in seen)


def test_a_signal_during_loading_stops_at_once_and_leaves_no_file(config: Path, tmp_path: Path) -> None:
    seen: list[events.Event] = []

    def sink(event: events.Event) -> None:
        seen.append(event)
        if isinstance(event, events.Progress) and event.stage == "Reading weights":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="SIGINT: no training step was made") as caught:
        flow.finetune(load_run(config).run, sink)
    assert "--resume" not in str(caught.value.fix), "there is no run to resume"
    assert sum(isinstance(event, events.Progress) and event.stage == "Reading weights" for event in seen) == 1
    assert not (tmp_path / "run").exists()


def test_changed_data_is_refused_on_resume(ingle: Ingle, config: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    rows = (tiny_data / "train.jsonl").read_text().splitlines()
    data.write_text("\n".join(rows[:40]))
    source = f"--data.sources=[{data}]"
    with _running(tmp_path, 1, config, source) as process:
        process.kill()
    data.write_text("\n".join(rows[1:40]))
    again = ingle("train", config, source)
    assert again.returncode == 2
    assert "training data has changed" in again.stderr


@pytest.mark.parametrize(("batch", "warned"), [(4, False), (512, True)])
def test_a_step_larger_than_the_data_has_a_warning(config: Path, batch: int, warned: bool) -> None:
    seen: list[events.Event] = []
    epochs = ["--train.num_steps=null", "--train.num_epochs=1", f"--train.global_batch_size={batch}"]
    plan = flow.plan(load_run(config, epochs).run, seen.append)
    assert (plan.num_epochs >= 1.5) == warned
    warnings = [event for event in seen if isinstance(event, events.Warned) and "the data is read" in event.message]
    assert len(warnings) == warned


def test_full_fine_tuning_ends_in_a_model_that_transformers_reads(config: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    flow.finetune(load_run(config, ["--adapter={kind: none}", "--base.format=none", "--optim.lr=1e-3"]).run)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").num_parameters() > 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metrics"]["bits_per_byte"]["delta"] < 0


def test_a_second_process_on_the_same_folder_is_refused(ingle: Ingle, config: Path, tmp_path: Path) -> None:
    with _running(tmp_path, 1, config) as process:
        process.send_signal(signal.SIGSTOP)  # so that it does not finish before the second one starts
        second = ingle("train", config)
    assert second.returncode == 2
    assert "Another process is using" in second.stderr
