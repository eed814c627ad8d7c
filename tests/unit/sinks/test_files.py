from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ingle.events import Saved, Started, Step
from ingle.sinks import MetricsFile
from ingle.sinks.files import keep_steps

KEYS = ["step", "loss", "num_tokens", "tokens_per_s", "lr", "grad_norm", "peak_memory_bytes", "epoch"]


def started(step: int = 0, num_steps: int = 10, log_every: int = 1) -> Started:
    return Started(run={"train": {"log_every": log_every}}, plan={}, audit={}, step=step, num_steps=num_steps)


def step(number: int, loss: float = 1.5, **metrics: float) -> Step:
    return Step(number, loss, 100 * number, 50.0, 1e-4, 0.5, 1 << 20, number / 10, metrics)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_object_a_step_with_exactly_the_agreed_keys(tmp_path: Path) -> None:
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


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "m")
    sink(started())
    sink(step(1, math.nan))
    sink(step(2, -math.inf))
    assert [line["loss"] for line in lines(tmp_path / "m")] == [None, None]


def test_every_step_is_kept_however_seldom_the_terminal_speaks(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "m")
    sink(started(log_every=4))
    for number in range(1, 11):
        sink(step(number))
    assert [line["step"] for line in lines(tmp_path / "m")] == list(range(1, 11))


@pytest.mark.parametrize(
    ("torn", "kept"),
    [
        (b"", [1, 2, 3]),
        (b'{"step": 6, "lo', [1, 2, 3]),
        (b"\x00\x00\x00", [1, 2, 3]),
        (b"null\n", [1, 2, 3]),
    ],
)
def test_going_on_cuts_off_steps_that_will_be_made_again(tmp_path: Path, torn: bytes, kept: list[int]) -> None:
    path = tmp_path / "m"
    sink = MetricsFile(path)
    sink(started())
    for number in range(1, 6):
        sink(step(number))
    with open(path, "ab") as file:
        file.write(torn)
    again = MetricsFile(path)
    again(started(step=3))
    assert [line["step"] for line in lines(path)] == kept
    for number in range(4, 8):
        again(step(number, 9.0))
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_torn_line_before_the_resumed_step_is_cut_off_too(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    keep_steps(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_new_run_empties_the_file_of_one_that_never_saved(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n')
    MetricsFile(path)(started(step=0))
    assert path.read_bytes() == b""
