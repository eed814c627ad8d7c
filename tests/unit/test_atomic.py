from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file as save

from ingle.atomic import atomic_folder, write_atomically
from ingle.errors import CheckpointError
from ingle.events import Step
from ingle.sinks.jsonl import MetricsFile


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    write_atomically(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target) as partial:
        (partial / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as partial:
        (partial / "x").write_text("new")
        raise RuntimeError
    assert (target / "x").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("expected", [CheckpointError, SafetensorError], ids=["full", "other"])
def test_a_full_disk_is_recognized_in_errors_of_safetensors(tmp_path: Path, expected: type[Exception]) -> None:
    number = errno.ENOSPC if expected is CheckpointError else errno.EIO
    with pytest.raises(expected), atomic_folder(tmp_path / "folder"):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_the_old_one_entirely(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target) as partial:
        (partial / "x").write_text("old")
    with atomic_folder(target) as partial:
        (partial / "y").write_text("new")
    assert [entry.name for entry in target.iterdir()] == ["y"]


def test_leftovers_of_a_killed_process_with_the_same_id_are_removed(tmp_path: Path) -> None:
    left = tmp_path / f"folder.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("a part")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "x").write_text("complete")
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["x"]


def test_exceeding_the_file_size_limit_is_reported_as_a_full_disk(tmp_path: Path) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = tmp_path / "metrics.jsonl"
    sink = MetricsFile(metrics)
    step = Step(1, 2.0, 1, 1.0, 1.0, 1.0, 1, 1.0)
    sink(step)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size, former[1]))
        with pytest.raises(CheckpointError, match="disk is full") as caught:
            sink(step)
        with pytest.raises(CheckpointError, match="disk is full"), atomic_folder(tmp_path / "step-3") as partial:
            save({"x": np.zeros(1000)}, partial / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert caught.value.where == str(metrics)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_interruption_between_the_two_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    with atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"old")
    rename, count = os.replace, iter(range(9))

    def interrupted(source: Path, place: Path) -> None:
        if next(count) == 1:
            raise KeyboardInterrupt
        rename(source, place)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"new")
    assert (target / "weights").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["adapter"]
