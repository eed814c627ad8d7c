"""Checkpoints are whole or absent, kept within bounds, and refuse what does not belong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ingle.config import OptimConfig
from ingle.errors import CheckpointError, DoesNotFit
from ingle.training.checkpoint import Checkpoints, Position, read
from ingle.training.folder import RunFolder
from ingle.training.optim import Optimizer, ParameterGroup


def _optimizer(name: str = "w") -> Optimizer:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6))
    optimizer = Optimizer([ParameterGroup(((name, parameter),), 1.0, 0.0)], OptimConfig())
    parameter.grad = torch.randn(6)
    optimizer.step(0.1)
    return optimizer


def _position(step: int) -> Position:
    return Position(step=step, num_tokens=1000 * step, data_hash="abc", train_s=1.5, wall_s=2.5)


class Part:
    """A part of a run with plain values and a tensor in its state."""

    def __init__(self, counter: int = 16) -> None:
        self.state = {"counter": counter, "nested": {"seen": [1, 2]}, "pool": torch.arange(counter)}

    def state_dict(self) -> Mapping[str, Any]:
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


def _checkpoints(
    folder: Path, keep: int = 2, optimizer: Optimizer | None = None, part: Part | None = None
) -> Checkpoints:
    states = {"optimizer": optimizer or _optimizer(), "objective": part or Part()}
    return Checkpoints(RunFolder(folder), keep, states)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    optimizer = _optimizer()
    _checkpoints(tmp_path, optimizer=optimizer).save(_position(3))
    expected = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    other, part = _optimizer(), Part(3)
    other.step(0.5)
    checkpoints = _checkpoints(tmp_path, optimizer=other, part=part)
    latest = checkpoints.latest()
    assert latest is not None
    assert checkpoints.load(latest, "abc") == _position(3)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert part.state.pop("pool").equal(torch.arange(16))
    assert part.state == {"counter": 16, "nested": {"seen": [1, 2]}}


def test_the_best_checkpoint_stays_until_there_is_a_better_one(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, keep=1)
    best = {0: 0, 2: 2, 4: 2, 6: 2, 8: 8, 10: 8}
    kept = []
    for step, pinned in best.items():
        checkpoints.save(_position(step), pinned)
        kept.append(checkpoints.steps())
    assert kept == [[0], [2], [2, 4], [2, 6], [8], [8, 10]]


def test_the_weights_of_a_step_are_restored_without_the_rest(tmp_path: Path) -> None:
    optimizer, part = _optimizer(), Part()
    checkpoints = _checkpoints(tmp_path, optimizer=optimizer, part=part)
    checkpoints.save(_position(3))
    expected = {name: master.detach().clone() for name, master in optimizer.named_masters()}
    for _, master in optimizer.named_masters():
        master.data.zero_()
    part.state = {"counter": 17}
    checkpoints.load_weights(3, "abc")
    assert all(torch.equal(master, expected[name]) for name, master in optimizer.named_masters())
    assert part.state == {"counter": 17}


def test_only_the_newest_are_kept_and_order_is_numeric(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, keep=2)
    for step in (8, 9, 10, 100):
        checkpoints.save(_position(step))
    assert checkpoints.steps() == [10, 100]


def test_a_torn_write_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    checkpoints.save(_position(1))
    torn = tmp_path / "checkpoints" / "step-2.partial-99999"
    torn.mkdir()
    (torn / "optimizer.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [1]
    checkpoints.save(_position(3))
    assert not torn.exists()


@pytest.mark.parametrize("victim", ["optimizer.safetensors", "objective.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, victim: str) -> None:
    path = _checkpoints(tmp_path).save(_position(1))
    content = (path / victim).read_bytes()
    (path / victim).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_single_changed_bit_is_damage(tmp_path: Path) -> None:
    path = _checkpoints(tmp_path).save(_position(1))
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read(path)
    assert "the bytes of optimizer.safetensors do not match" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"step": 2}, {"states": {}}, {"num_tokens": 1}, {"data_hash": "abd"}, {"wall_s": 0.0}, {"sha256": {}}, {"x": 1}],
)
def test_a_changed_position_is_damage(tmp_path: Path, change: dict[str, object]) -> None:
    path = _checkpoints(tmp_path).save(_position(1))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state))
    assert read(path).position == _position(1), "the digest is of the values, not of their layout"
    (path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


def test_a_checkpoint_in_a_folder_of_another_step_is_damage(tmp_path: Path) -> None:
    path = _checkpoints(tmp_path).save(_position(1))
    with pytest.raises(CheckpointError, match="it contains step 1, but its folder has another name"):
        read(path.rename(path.with_name("step-9")))


def test_other_data_is_refused(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    path = checkpoints.save(_position(1))
    with pytest.raises(CheckpointError, match="training data has changed"):
        checkpoints.load(path, "another")


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    path = checkpoints.save(_position(1))
    with pytest.raises(CheckpointError, match="not those that this run trains"):
        _checkpoints(tmp_path, optimizer=_optimizer("v")).load(path, "abc")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = _checkpoints(tmp_path).save(_position(1))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read(path)


def test_rehearsal_refuses_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "free_bytes", lambda self: 1000)
    with pytest.raises(DoesNotFit, match=r"of disk space; .* are free"):
        _checkpoints(tmp_path).rehearse(_position(0))


def test_rehearsal_notices_a_disk_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = _checkpoints(tmp_path)
    honest = read

    def lie(*arguments):  # type: ignore[no-untyped-def]
        checkpoint = honest(*arguments)
        checkpoint.tensors["optimizer"]["master.w"][0] += 1
        return checkpoint

    monkeypatch.setattr("ingle.training.checkpoint.read", lie)
    with pytest.raises(CheckpointError, match="differs from what was written"):
        checkpoints.rehearse(_position(0))
