"""Checkpoints of a run on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ingle.config import OptimConfig
from ingle.training.checkpoint import Checkpoints, Position
from ingle.training.folder import RunFolder
from ingle.training.optim import Optimizer, ParameterGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def _start(dtype: torch.dtype) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(torch.linspace(-1, 1, 9, dtype=dtype, device="cuda"))
    return parameter, Optimizer([ParameterGroup((("w", parameter),), 1.0, 0.0)], OptimConfig())


def _step(parameter: nn.Parameter, optimizer: Optimizer) -> None:
    parameter.float().square().sum().backward()
    optimizer.step(1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_restored_optimizer_continues_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, optimizer = _start(dtype)
    checkpoints = Checkpoints(RunFolder(tmp_path), 2, {"optimizer": optimizer})
    checkpoints.rehearse(Position(0, 0, "abc"))
    _step(whole, optimizer)
    saved = checkpoints.save(Position(1, 100, "abc"))
    _step(whole, optimizer)

    again, continued = _start(dtype)
    Checkpoints(RunFolder(tmp_path), 2, {"optimizer": continued}).load(saved, "abc")
    _step(again, continued)
    assert again.device.type == "cuda"
    assert torch.equal(again, whole)
