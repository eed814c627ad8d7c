"""An objective over pairs: a step does not depend on how it is cut, and the start of a run is proved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ingle.adapters import attach, lora_modules
from ingle.config import ModelConfig
from ingle.config.adapter import LoraAdapter
from ingle.config.run import Run
from ingle.data import HeldOut
from ingle.data.batch import Batch, round_up
from ingle.errors import ProofFailed
from ingle.events import Event, Proved
from ingle.models import load_model
from ingle.objectives import Check, Sums
from ingle.objectives.dealing import start_without_labels
from ingle.parallel import Mesh
from ingle.training.out_of_memory import MemoryRelief
from ingle.training.proof import check_start, prove_start
from ingle.training.steps import compute_gradients, prepare, weighted_mean
from ingle.training.validation import Validation
from tests.axis import write_model
from tests.pairs import BETA, REFERENCE, PairLoss, PairObjective, make_dataset, make_objective, rows_of

MESH = Mesh(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "llama"
    write_model(folder, "llama")
    return folder


def make_module(folder: Path, *, moved: float = 0.0, kind: type[PairLoss] = PairLoss) -> PairLoss:
    """A model with an adapter in float64, whose B is ``moved`` away from zero."""
    model = load_model(ModelConfig(id=str(folder), dtype="float32"))
    attach(model, LoraAdapter(kind="lora", rank=2), seed=0)
    model.double()
    generator = torch.Generator().manual_seed(0)
    for layer in lora_modules(model).values():
        layer.lora_b.data += moved * torch.randn(layer.lora_b.shape, generator=generator, dtype=torch.float64)
    return kind(model).train()


class Peers(Mesh):
    """A rank whose peers count and sum what it is given."""

    peers: Mapping[str, float]

    def reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        return {name: value + self.peers.get(name, 0.0) for name, value in values.items()}


def _step(objective: PairObjective, parts: Sequence[Batch], mesh: Mesh = MESH) -> tuple[dict[str, float], Tensor]:
    """The loss and the metrics of a step, and its gradient."""
    objective.module.zero_grad()
    prepared = prepare(objective, parts)
    sums, counts = compute_gradients(objective, prepared, mesh, seed=0, step=1)
    found = {"loss": weighted_mean(objective.module.terms, sums, counts), **objective.metrics(sums, counts)}
    trained = [p for p in objective.module.parameters() if p.requires_grad]
    return found, torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


def _require_equal(found: tuple[dict[str, float], Tensor], expected: tuple[dict[str, float], Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert (found[1] - expected[1]).norm() <= 1e-12 * expected[1].norm() > 0


def test_a_step_does_not_depend_on_how_it_is_cut_or_dealt(folder: Path) -> None:
    objective = make_objective(make_module(folder, moved=0.1), MESH)
    (whole,) = objective.next_batches()
    rows = [round_up(row) for row in whole.split(8)]
    assert len(rows) == 8
    counts = objective.module.counts(whole)
    assert 0 < counts["pairs"] < 8, "some rows count for nothing"
    expected = _step(objective, [whole])
    assert expected[0].keys() == {"loss", "sft", "rewards/accuracy", "rewards/margin"}
    _require_equal(_step(objective, rows), expected)
    for num_parts in (2, 3, 5):
        _require_equal(_step(objective, [round_up(part) for part in whole.split(num_parts)]), expected)

    # Three ranks, the last of which has no rows.
    empty = start_without_labels(make_dataset().sample(0))
    dealt = [rows[:3], rows[3:], [empty]]
    total = torch.zeros_like(expected[1])
    for rank, own in enumerate(dealt):
        others = prepare(objective, [part for other, parts in enumerate(dealt) if other != rank for part in parts])
        peers: dict[str, float] = {}
        with torch.no_grad():
            for part in others:
                sums = objective.module(part)
                for name, value in {**sums.losses, **sums.metrics, **objective.module.counts(part)}.items():
                    peers[name] = peers.get(name, 0.0) + float(value)
        mesh = Peers(torch.device("cpu"), dist_rank=rank, world_size=3)
        object.__setattr__(mesh, "peers", peers)
        found, gradient = _step(objective, own, mesh)
        assert found == pytest.approx(expected[0], rel=1e-12)
        total += gradient
    _require_equal((expected[0], total), expected)


def test_rows_that_count_for_nothing_add_an_exact_zero(folder: Path) -> None:
    objective = make_objective(make_module(folder, moved=0.1), MESH)
    rows = [row for row in objective.next_batches()[0].split(8) if not objective.module.counts(row)["pairs"]]
    assert rows
    found, gradient = _step(objective, rows)
    assert found == {"loss": 0.0} and gradient.numel() > 0 and not gradient.any()


def test_the_terms_are_those_of_a_closed_form(folder: Path) -> None:
    """Each pair alone, by plain means over all pairs and all tokens."""
    objective = make_objective(make_module(folder, moved=0.1), MESH)
    found, _ = _step(objective, objective.next_batches())
    objective.load_state_dict({"counter": 0})
    margins, chosen, tokens = [], 0.0, 0
    module: Any = objective.module
    for row in objective.next_batches()[0].split(8):
        (part,) = prepare(objective, [row])
        with torch.no_grad():
            logps, targets = module.logps(part), part.next_labels()
        border = int(part.cu_seqlens[1])
        sides = [(targets >= 0) & (torch.arange(len(targets)) < border), (targets >= 0)]
        sides[1] &= ~(torch.arange(len(targets)) < border)
        if all(side.any() for side in sides):
            ratios = [float((logps - part.columns[REFERENCE][0])[side].sum()) for side in sides]
            margins.append(BETA * (ratios[0] - ratios[1]))
            chosen, tokens = chosen - float(logps[sides[0]].sum()), tokens + int(sides[0].sum())
    losses = np.log1p(np.exp(-np.array(margins)))
    assert found["loss"] == pytest.approx(losses.mean() + 0.25 * chosen / tokens, rel=1e-9)
    assert found["sft"] == pytest.approx(chosen / tokens, rel=1e-9)
    assert found["rewards/margin"] == pytest.approx(np.mean(margins), rel=1e-9)
    assert found["rewards/accuracy"] == np.mean(np.array(margins) > 0)


def _prove(objective: PairObjective) -> dict[str, Check]:
    parts = prepare(objective, objective.next_batches())
    return {check.name: check for check in check_start(objective, parts, MESH, dtype=torch.float64, has_adapter=True)}


def test_a_run_that_begins_at_its_reference_is_proved_and_the_proof_is_kept(folder: Path, tmp_path: Path) -> None:
    objective = make_objective(make_module(folder), MESH, micro=3)
    events: list[Event] = []
    parts = prepare(objective, objective.next_batches())
    prove_start(
        parts, objective, MESH, dtype=torch.float64, has_adapter=True, file=tmp_path / "start.json", sink=events.append
    )
    (proved,) = events
    assert isinstance(proved, Proved) and (tmp_path / "start.json").is_file()
    assert list(proved.checks) == ["adapter equals base", "no dropout", "log-ratio", "stored reference", "preference"]
    assert proved.checks["preference"]["measured"] == pytest.approx(math.log(2), rel=1e-9)
    assert objective.module.training


class _WrongSign(PairLoss):
    def compute(self, batch: Batch) -> Sums:
        sums = super().compute(batch)
        return replace(sums, losses={**sums.losses, "preference": -sums.losses["preference"]})


def test_a_run_that_begins_elsewhere_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    def failed(objective: PairObjective) -> list[str]:
        return [name for name, check in _prove(objective).items() if not check.holds]

    moved = make_objective(make_module(folder, moved=1e-3), MESH)
    assert failed(moved) == ["adapter equals base", "log-ratio", "preference"]
    assert failed(make_objective(make_module(folder, kind=_WrongSign), MESH)) == ["preference"]
    stale = make_objective(make_module(folder), MESH)
    stale.shift = 0.1
    assert failed(stale)[:1] == ["stored reference"]
    dropping = make_module(folder)
    next(iter(lora_modules(dropping.model).values())).dropout = 0.1
    assert failed(make_objective(dropping, MESH)) == ["no dropout"]
    random = make_module(folder)
    random.model.get_submodule("model.norm").register_forward_hook(
        lambda module, inputs, output: torch.nn.functional.dropout(output, 0.1, module.training)
    )
    assert "no dropout" in failed(make_objective(random, MESH))

    objective = make_objective(make_module(folder, kind=_WrongSign), MESH)
    parts = prepare(objective, objective.next_batches())
    with pytest.raises(ProofFailed, match="known value: preference") as refused:
        prove_start(
            parts, objective, MESH, dtype=torch.float64, has_adapter=True, file=tmp_path / "start.json", sink=print
        )
    assert "measured -0.693147, expected 0.693147" in str(refused.value)
    assert not (tmp_path / "start.json").exists()


def test_a_check_that_is_nan_does_not_hold() -> None:
    assert not Check("loss", math.nan, 0.0, 1.0, "").holds and Check("loss", math.inf, math.inf, 0.0, "").holds


def test_validation_measures_pairs_with_their_own_denominators(folder: Path, tmp_path: Path) -> None:
    held_out = HeldOut(make_dataset(), rows_of(12), np.arange(24), np.arange(24) // 2)
    run = Run.model_validate({
        "model": {"id": str(folder)}, "data": {"sources": [{"path": "x.jsonl"}]}, "output": str(tmp_path),
    })  # fmt: skip
    points = []
    for num_parts in (1, 2):
        objective = make_objective(make_module(folder, moved=0.1), MESH, micro=5, held_out=held_out)
        relief = MemoryRelief(tmp_path / "memory.json", MESH, print, None, num_parts)
        found = Validation(run, 1, objective, held_out, MESH, relief, dict).take(1)
        assert found is not None and objective.calls == [("prepare", 3 * num_parts)], "all parts together"
        points.append({"loss": found.loss, **found.metrics})
    assert points[0] == pytest.approx(points[1], rel=1e-9)
    assert points[0].keys() == {"loss", "rewards/accuracy", "logps/chosen"}
    training = make_objective(make_module(folder, moved=0.1), MESH, batch=12, micro=12)
    expected, _ = _step(training, training.next_batches())
    assert points[0]["rewards/accuracy"] == pytest.approx(expected["rewards/accuracy"])
    assert points[0]["loss"] == pytest.approx(expected["loss"] - 0.25 * expected["sft"], rel=1e-9)
