"""Ranks train on pairs with a reference as one process does: the proof, the phases of a step, and the last weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingle import flow, objectives
from ingle.config.run import Run
from ingle.parallel import Mesh
from tests.axis import POINTS, config_of
from tests.distributed.ranks import run_ranks
from tests.pairs import PairLoss, PairObjective, make_objective


def _train(mesh: Mesh, configs: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Trains on rows of pairs; with two ranks, one has none in the last turn of a step."""
    prepared = {}
    for kind, config in configs.items():
        made: list[PairObjective] = []

        def build(run: Run, context: objectives.Context, made: list[PairObjective] = made) -> PairObjective:
            made.append(make_objective(PairLoss(context.model), context.mesh, batch=3, micro=1))
            return made[-1]

        objectives.build = build
        flow.finetune(Run.model_validate(config))
        prepared[kind] = sum(number for name, number in made[-1].calls if name == "prepare")
    return prepared


@pytest.mark.parametrize("kind", ["zero3", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("zero1", "ddp"))])
def test_ranks_train_on_pairs_as_one_process_does(tmp_path: Path, kind: str) -> None:
    def config(kind: str) -> dict[str, Any]:
        found = config_of(tmp_path, POINTS["clm, packed"])
        found["data"].pop("validation")
        found["parallel"]["kind"] = kind
        found["train"] |= {"global_batch_size": 3, "micro_batch_size": 1}
        return found | {"output": str(tmp_path / kind)}

    assert run_ranks(1, _train, {"none": config("none")}) == [{"none": 12}]
    assert run_ranks(2, _train, {kind: config(kind)}) == [{kind: 8}] * 2
    expected = [json.loads(line) for line in (tmp_path / "none" / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(tmp_path / "none" / "adapter" / "adapter_model.safetensors")
    found = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "sft", "rewards/margin", "rewards/accuracy", "grad_norm"):
        assert [step[name] for step in found] == pytest.approx([s[name] for s in expected], rel=1e-3, abs=1e-5)
    proof = json.loads((tmp_path / kind / "start.json").read_text())
    assert proof["log-ratio"]["measured"] <= 1e-5
    torch.testing.assert_close(
        load_file(tmp_path / kind / "adapter" / "adapter_model.safetensors"), weights, rtol=1e-3, atol=1e-4
    )
