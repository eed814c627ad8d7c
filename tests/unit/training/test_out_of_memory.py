"""Out of memory: the step is computed in smaller parts with the same gradient, then recomputed, then refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ingle.config import OptimConfig
from ingle.data.batch import Batch, collate
from ingle.data.types import Sample
from ingle.errors import DoesNotFit, OutOfMemory
from ingle.events import Event, Warned
from ingle.objectives import Sums
from ingle.parallel import Mesh
from ingle.training.optim import Optimizer, ParameterGroup
from ingle.training.out_of_memory import MemoryRelief, is_out_of_memory
from ingle.training.steps import take_step
from tests.unit.training.test_steps import Toy, ToyModule


def _batch(*lengths: int) -> Batch:
    documents = [np.arange(length, dtype=np.int32) for length in lengths]
    return collate([Sample(ids, ids) for ids in documents])


def _relief(folder: Path, events: list[Event], calls: list[str], world_size: int = 1) -> MemoryRelief:
    mesh = Mesh(torch.device("cpu"), world_size=world_size)
    return MemoryRelief(folder / "memory.json", mesh, events.append, lambda: calls.append("on"))


def test_parts_double_then_layers_recompute_then_the_run_is_refused(tmp_path: Path) -> None:
    events: list[Event] = []
    calls: list[str] = []
    relief = _relief(tmp_path, events, calls)
    batches = [_batch(6, 6, 6), _batch(6)]
    sizes = []
    for _ in range(3):
        relief.relieve("CUDA out of memory.", batches)
        sizes.append([part.num_documents for part in relief.split(batches)])
    assert sizes == [[1, 2, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert calls == ["on"]
    assert all(isinstance(event, Warned) for event in events)
    assert "in 2 parts" in str(events[0])
    with pytest.raises(DoesNotFit, match="one document at a time") as caught:
        relief.relieve("CUDA out of memory.", batches)
    assert caught.value.where == "a document of 6 tokens"
    resumed = _relief(tmp_path, events, calls)
    resumed.restore()
    assert (resumed.num_parts, calls) == (4, ["on", "on"])


def test_a_rank_without_documents_is_refused_with_the_same_error(tmp_path: Path) -> None:
    relief = MemoryRelief(tmp_path / "memory.json", Mesh(torch.device("cpu"), world_size=2), print, None)
    with pytest.raises(DoesNotFit, match="one document at a time"):
        relief.relieve("CUDA out of memory.", [replace(_batch(2), num_documents=0)])


def test_a_rank_keeps_the_settings_and_asks_to_be_started_again(tmp_path: Path) -> None:
    relief = _relief(tmp_path, [], [], world_size=2)
    with pytest.raises(OutOfMemory, match="in 2 parts"):
        relief.relieve("CUDA out of memory.", [_batch(6, 6)])
    resumed = _relief(tmp_path, [], [], world_size=2)
    resumed.mesh = Mesh(torch.device("cpu"))
    resumed.restore()
    resumed.mesh = Mesh(torch.device("cpu"), world_size=2)
    parts = resumed.split([_batch(6, 6), _batch(9)])
    assert [part.num_documents for part in parts] == [1, 1, 1, 0], "every rank computes equally many parts"
    assert parts[-1].num_supervised == 0


class _Tokens(ToyModule):
    """The loss over supervised tokens alone; runs out of memory with more tokens at once than ``limit``."""

    limit = 1000

    def compute(self, batch: Batch) -> Sums:
        if batch.num_tokens > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sums = super().compute(batch)
        return Sums(dict(sums.losses) | {"firsts": sums.losses["firsts"] * 0}, sums.metrics)


class _Limited(_Tokens):
    limit = 8


def test_the_step_is_computed_again_with_the_same_result(tmp_path: Path) -> None:
    documents = [(5, 2), (3, 1), (4, 4), (2, 1), (6, 3)]
    batches = [_batch(*(length for length, _ in documents)), _batch(7)]
    results = []
    for module in (_Tokens, _Limited):
        torch.manual_seed(1)
        model = nn.Embedding(11, 4)
        optimizer = Optimizer([ParameterGroup((("weight", model.weight),), 1.0, 0.0)], OptimConfig())
        relief = _relief(tmp_path, [], [])
        mesh = relief.mesh
        result = take_step(Toy(batches, module(model)), optimizer, mesh, lr=0.1, seed=0, step=1, relief=relief)
        results.append((result, model.weight.detach().clone(), relief.num_parts))
    (one, one_weight, _), (other, other_weight, num_parts) = results
    assert num_parts == 4
    assert (other.loss, other.grad_norm) == pytest.approx((one.loss, one.grad_norm), rel=1e-6)
    torch.testing.assert_close(other_weight, one_weight)


class _Prepared(Toy):
    """Runs out of memory when it prepares more than eight tokens at once."""

    prepares = True

    def prepare(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        if max(part.num_tokens for part in parts) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [replace(part, columns={**part.columns, "weights": part.labels.float()}) for part in parts]


def test_what_runs_out_of_memory_before_the_step_is_made_again_in_smaller_parts(tmp_path: Path) -> None:
    proved: list[list[int]] = []

    def prove(parts: Sequence[Batch]) -> None:
        assert all("weights" in part.columns for part in parts)
        proved.append([part.num_tokens for part in parts])

    model = nn.Embedding(11, 4)
    optimizer = Optimizer([ParameterGroup((("weight", model.weight),), 1.0, 0.0)], OptimConfig())
    relief = _relief(tmp_path, [], [])
    objective = _Prepared([_batch(5, 3, 4, 2, 6), _batch(7)], ToyModule(model))
    take_step(objective, optimizer, relief.mesh, lr=0.1, seed=0, step=1, relief=relief, prove=prove)
    assert relief.num_parts == 4 and len(proved) == 1 and max(proved[0]) <= 8 and sum(proved[0]) == 27


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_cpu_allocator_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
