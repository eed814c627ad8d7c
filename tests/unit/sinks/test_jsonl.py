from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ingle.events import Event, Failed, Progress, Saved, Started, Step, Validated, Warned, from_dict
from ingle.sinks import EventsFile, MetricsFile
from ingle.sinks.jsonl import cut_after_step

KEYS = ["step", "loss", "num_tokens", "tokens_per_s", "lr", "grad_norm", "peak_memory_bytes", "epoch"]


def started(step: int = 0, log_every: int = 1) -> Started:
    return Started(run={"train": {"log_every": log_every}}, plan={}, audit={}, step=step, num_steps=10)


def step(number: int, loss: float = 1.5, **metrics: float) -> Step:
    return Step(number, loss, 100 * number, 50.0, 1e-4, 0.5, 1 << 20, number / 10, metrics)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_have_one_object_per_step_with_the_documented_keys(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path)
    sink(Saved(0, "x", "checkpoint"))
    assert not path.exists()
    sink(started())
    sink(step(1))
    assert lines(path) == [dict(zip(KEYS, [1, 1.5, 100, 50.0, 1e-4, 0.5, 1 << 20, 0.1], strict=True))]
    assert list(lines(path)[0]) == KEYS
    sink(step(2, accuracy=0.25))
    assert list(lines(path)[1]) == [*KEYS, "accuracy"]


def test_numbers_that_json_lacks_are_null_in_metrics(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "m")
    for event in (started(), step(1, math.nan), step(2, -math.inf)):
        sink(event)
    assert [line["loss"] for line in lines(tmp_path / "m")] == [None, None]


def test_metrics_have_every_step_whatever_the_terminal_logs(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "m")
    for event in (started(log_every=4), *(step(number) for number in range(1, 11))):
        sink(event)
    assert [line["step"] for line in lines(tmp_path / "m")] == list(range(1, 11))


@pytest.mark.parametrize("sink_type", [MetricsFile, EventsFile])
@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "lo', b"\x00\x00\x00", b"null\n"])
def test_a_resumed_run_cuts_off_the_steps_that_it_repeats(tmp_path: Path, sink_type: Any, torn: bytes) -> None:
    path = tmp_path / "m"
    sink = sink_type(path)
    for event in (started(), *(step(number) for number in range(1, 6)), Failed("bad")):
        sink(event)
    with open(path, "ab") as file:
        file.write(torn)
    again = sink_type(path)
    again(started(step=3))
    for number in range(4, 8):
        again(step(number, 9.0))
    steps = [line for line in lines(path) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in steps] == [1.5] * 3 + [9.0] * 4


@pytest.mark.parametrize("sink_type", [MetricsFile, EventsFile])
@pytest.mark.parametrize("validated", [2, 4])
def test_a_validation_that_the_resumed_run_repeats_is_cut_off(tmp_path: Path, sink_type: Any, validated: int) -> None:
    """The checkpoint of step 4 was saved before the validation or after it."""
    path = tmp_path / "m"
    sink = sink_type(path)
    sink(started())
    for number in range(1, 6):
        sink(step(number))
        if number % 2 == 0:
            sink(Validated(number, 1.0, 2, 1.0, metrics={"chrf": 3.0}))
    sink_type(path)(replace(started(step=4), validated=validated))
    kept = [line for line in lines(path) if "loss" in line or "validation_loss" in line]
    steps = [line["step"] for line in kept if "validation_loss" in line or line.get("event") == "validated"]
    assert steps == [2, 4][: validated // 2]
    assert [line["step"] for line in kept if "lr" in line] == [1, 2, 3, 4]


def test_a_validation_has_a_line_of_its_own(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "m")
    for event in (started(), Validated(0, 2.5, 0, 2.5, metrics={"chrf": 3.0})):
        sink(event)
    assert lines(tmp_path / "m") == [{"step": 0, "validation_loss": 2.5, "validation_chrf": 3.0}]


def test_a_torn_line_before_the_resumed_step_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    cut_after_step(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_new_run_empties_the_file_of_one_that_saved_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n')
    MetricsFile(path)(started(step=0))
    assert path.read_bytes() == b""


def test_the_events_file_has_all_events_and_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = EventsFile(path)
    before: list[Event] = [Progress("Reading weights", 1, 2), Warned("Odd.", "caf\udce9.jsonl:3", 2)]
    for event in before:
        sink(event)
    assert not path.exists()  # a run that cannot start leaves its folder as it was
    after: list[Event] = [started(), step(1, accuracy=0.5), Saved(1, "c", "checkpoint"), Failed("bad")]
    for event in after:
        sink(event)
    assert [from_dict(line) for line in lines(path)] == [*before, *after]
