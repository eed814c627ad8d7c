"""Two ranks take the steps of one process and hand a run over to one, for every objective and layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ingle import flow
from ingle.assembly import assemble
from ingle.config.run import Run
from ingle.errors import ModelError
from ingle.events import Event, Saved
from ingle.parallel import Mesh
from tests.axis import POINTS, config_of
from tests.distributed.cases import StepOfOneRank, take_all
from tests.distributed.ranks import run_ranks

#: Kinds of parallelism. :mod:`tests.distributed.test_exactness` has those of causal models.
ON = {
    "sft, dealt attention": ("zero3",),
    "clm, galore, full": ("zero3", "ddp"),
    "clm, apollo, full": ("zero1",),
    "clm, lisa, full": ("ddp",),
    "sft, subspace": ("ddp",),
    "mlm, packed": ("zero3", "zero1"),
    "mlm, dealt, full": ("ddp",),
    "mlm, equal rows": ("ddp",),
    "span, packed": ("zero3", "ddp"),
    "span, rows": ("zero3", "ddp"),
    "seq2seq, packed, full": ("ddp", "zero3", "zero1"),
    "seq2seq, rows": ("zero3", "zero2"),
    "classify, packed, full": ("zero3", "ddp"),
    "classify, dealt": ("zero2",),
    "classify, pairs": ("zero3",),
    "tag, dealt": ("zero3", "ddp"),
    "tag, rows": ("ddp",),
    "sft, packed, bottleneck": ("zero3", "ddp"),
    "seq2seq, packed, ia3": ("zero3", "zero1"),
    "classify, packed, biases": ("zero3", "zero2"),
    "dpo, packed, oft": ("zero3",),
    "sft, packed, adalora": ("zero3", "zero1"),
    "answer, packed": ("zero3", "zero1"),
    "answer, equal rows": ("ddp",),
    "dpo, packed": ("ddp",),
    "kto, dealt states": ("zero3",),
    "grpo, packed": ("ddp", "zero3"),
    "ppo, dealt attention": ("zero3",),
    "online_dpo, packed": ("ddp",),
}
ELASTIC = {"mlm, packed": "zero3", "span, packed": "zero1", "classify, packed, full": "zero3", "tag, dealt": "ddp"} | {
    "sft, packed, adalora": "zero3"
}
_CASES = [(name, kind) for name, kinds in ON.items() for kind in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("axis")


def _config(folder: Path, name: str, kind: str, **train: Any) -> dict[str, Any]:
    config = config_of(folder, POINTS[name])
    config["parallel"]["kind"] = kind
    config["train"] |= {"global_batch_size": 3, "micro_batch_size": 1} | train  # one rank has no documents in a turn
    if "num_prompts" in config["objective"]:
        config["objective"]["num_prompts"] = 3  # in steps of three answers
    return config


@pytest.fixture(scope="module")
def results(folder: Path, request: pytest.FixtureRequest) -> dict[int, list[dict[str, StepOfOneRank]]]:
    """The results of every rank, by number of ranks, of the cases that are selected."""
    chosen = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    cases = [(name, kind) for name, kind in _CASES if f"{name}-{kind}" in chosen]
    alone = {name: _config(folder, name, "none") for name, _ in cases}
    shared = {f"{name}: {kind}": _config(folder, name, kind) for name, kind in cases}
    return {1: run_ranks(1, take_all, alone, timeout_s=300), 2: run_ranks(2, take_all, shared, timeout_s=300)}


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "kind"), _CASES)
def test_two_ranks_take_the_steps_of_one_process(
    results: dict[int, list[dict[str, StepOfOneRank]]], name: str, kind: str
) -> None:
    expected = results[1][0][name]
    largest = max(np.linalg.norm(gradient) for gradient in expected.gradients.values())
    for each in results[2]:
        found = each[f"{name}: {kind}"]
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.norm == pytest.approx(expected.norm, rel=1e-4)
        # A sharded parameter that no rank used has a gradient of zeros.
        unused = found.gradients.keys() - expected.gradients.keys()
        assert not any(found.gradients[parameter].any() for parameter in unused)
        for parameter, gradient in expected.gradients.items():
            assert np.linalg.norm(found.gradients[parameter] - gradient) <= 1e-4 * largest, parameter
        np.testing.assert_allclose(found.held_out, expected.held_out, rtol=1e-4)


def _train(mesh: Mesh, configs: dict[str, dict[str, Any]]) -> None:
    """Trains, and keeps a copy of each run as it is after its second step."""
    for config in configs.values():
        output = Path(config["output"])

        def copy(event: Event, output: Path = output) -> None:
            if isinstance(event, Saved) and event.step == 2:
                shutil.copytree(output, output.with_name(f"{output.name}-elastic"))

        flow.finetune(Run.model_validate(config), copy)


def test_one_process_continues_the_run_of_two_ranks(folder: Path) -> None:
    shared = {name: _config(folder, name, kind, num_steps=3) for name, kind in ELASTIC.items()}
    for name, config in shared.items():
        config["output"] = str(folder / f"run {name}")
    run_ranks(2, _train, shared, timeout_s=300)
    for config in shared.values():
        flow.resume(Path(f"{config['output']}-elastic"))
        (expected,) = Path(config["output"]).glob("*/*model.safetensors")
        found = Path(f"{config['output']}-elastic") / expected.relative_to(config["output"])
        torch.testing.assert_close(load_file(found), load_file(expected), rtol=1e-3, atol=1e-4)


def _refusal(mesh: Mesh, config: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as refused:
        assemble(Run.model_validate(config), lambda event: None)
    return str(refused.value)


@pytest.mark.parametrize("name", ["answer, equal rows", "mlm, equal rows", "tag, rows"])
def test_a_model_whose_weights_ranks_cannot_gather_together_is_not_sharded(folder: Path, name: str) -> None:
    for message in run_ranks(2, _refusal, _config(folder, name, "zero3")):
        assert "cannot be sharded" in message and "--parallel.kind=ddp" in message
