"""Initial values from training data and from rounding: against dense decompositions in float64, and against PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from ingle import adapters, flow
from ingle.adapters.data_starts import move_ranks
from ingle.adapters.fusion import FusedLayer
from ingle.assembly import Assembled, assemble
from ingle.config.run import Run
from ingle.objectives import Objective
from ingle.quant.linear import QuantLinear
from ingle.training import calibration
from ingle.training.steps import compute_gradients, prepare
from tests.axis import Point, config_of

#: A quarter of the width of the model, so that subspaces are whole spaces, and are found at once.
RANK = 8


def assembled(folder: Path, init: str, *, base: str = "none", **options: Any) -> Assembled:
    """A run of a small model; its initial values are those that the first step begins with."""
    adapter = {"kind": "lora", "rank": RANK, "init": init, "init_options": {"num_steps": 2, "iterations": 0, **options}}
    config = config_of(
        folder, Point("llama", "packed", {"kind": "sft"}, {"adapter": adapter, "base": {"format": base}})
    )
    config["adapter"]["target_modules"] = ["q_proj", "v_proj", "up_proj", "down_proj"]
    config["adapter"]["alpha"] = 3 * RANK
    config["output"] = str(folder / f"{init} {base} {options}")
    return assemble(Run.model_validate(config), lambda event: None)


def plain_weights(parts: Assembled) -> dict[str, nn.Parameter]:
    """Puts plain, trained weights in the place of bases, and turns the adapters off."""
    weights: dict[str, nn.Parameter] = {}
    for module in parts.model.modules():
        if isinstance(module, FusedLayer):  # it reads weights without a gradient, and calls no hooks
            module.enabled = False
    for path, layer in adapters.lora_modules(parts.model).items():
        base = layer.base
        assert isinstance(base, nn.Linear | QuantLinear)
        weight = base.decode(torch.float32) if isinstance(base, QuantLinear) else base.weight.detach()
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = weights[path] = nn.Parameter(weight.clone())
        parts.model.set_submodule(path, linear)
    return weights


def first_steps(objective: Objective, number: int) -> list[Any]:
    return [prepare(objective, objective.next_batches()) for _ in range(number)]


def angles(ours: Tensor, theirs: Tensor) -> Tensor:
    """Cosines between two spaces of rows."""
    bases = (torch.linalg.qr(each.double().t())[0] for each in (ours, theirs))
    return torch.linalg.svdvals(next(bases).t() @ next(bases))


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_gradients_of_the_base(base: str, tmp_path: Path) -> None:
    """LoRA-GA over any format begins as PEFT's does with the true gradient of the decoded weights."""
    parts = assembled(tmp_path, "lora_ga", base=base)
    layers = dict(adapters.lora_modules(parts.model))
    assert parts.objective.state_dict() == {"counter": 0}
    assert all(parameter.grad is None for parameter in parts.model.parameters())
    steps = first_steps(parts.objective, 2)
    weights = plain_weights(parts)
    for number, batches in enumerate(steps):
        compute_gradients(parts.objective, batches, parts.mesh, seed=0, step=number)
    for path, layer in layers.items():
        grad = weights[path].grad
        assert grad is not None and layer.initial_a is not None and layer.initial_b is not None
        assert torch.equal(layer.initial_a, layer.lora_a) and torch.equal(layer.initial_b, layer.lora_b)
        theirs = PeftLinear(
            nn.Linear(layer.in_features, layer.out_features, bias=False), "default", config=peft.LoraConfig(), r=RANK
        )
        theirs.base_layer._peft_loraga_grad = grad / 2
        theirs.lora_ga_init("default", peft.LoraGAConfig())
        # The sign of a direction of A is not that of a direction of B, so spaces and sizes are compared.
        a, b = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
        assert angles(layer.lora_a.detach(), a).min() > 1 - 1e-4
        assert angles(layer.lora_b.detach().t(), b.t()).min() > 1 - 1e-3
        torch.testing.assert_close(layer.lora_b.norm(dim=0), b.norm(dim=0), rtol=1e-3, atol=1e-9)


def test_training_begins_at_the_base(tmp_path: Path) -> None:
    parts = assembled(tmp_path, "lora_ga")
    (batches,) = first_steps(parts.objective, 1)
    with torch.no_grad():
        ours = parts.objective.module.compute(batches[0]).losses
        with adapters.use(parts.model, "off"):
            base = parts.objective.module.compute(batches[0]).losses
    for name, value in ours.items():
        torch.testing.assert_close(value, base[name], rtol=1e-5, atol=0)


def test_directions_of_inputs(tmp_path: Path) -> None:
    """EVA's A is the SVD of all real inputs of a layer; ranks go where the inputs' squares are."""
    parts = assembled(tmp_path, "eva", rho=2.0, iterations=8)
    layers = adapters.lora_modules(parts.model)
    steps = first_steps(parts.objective, 2)
    inputs: dict[str, list[Tensor]] = {path: [] for path in layers}
    plain_weights(parts)
    rows = [0]
    for path in inputs:

        def keep(module: nn.Module, given: tuple[Tensor, ...], path: str = path) -> None:
            inputs[path].append(given[0][0, : rows[0]].double())

        parts.model.get_submodule(path).register_forward_pre_hook(keep)
    parts.objective.module.eval()
    with torch.no_grad():
        for batch in (each for batches in steps for each in batches):
            rows[0] = batch.num_tokens
            parts.objective.module.compute(batch)
    decomposed = {path: torch.linalg.svd(torch.cat(each), full_matrices=False) for path, each in inputs.items()}
    shares = {path: s.square() / s.square().sum() for path, (_, s, _) in decomposed.items()}
    ranks = move_ranks(shares, dict.fromkeys(layers, RANK), 2.0)
    assert {path: layer.rank for path, layer in layers.items()} == ranks
    assert sum(ranks.values()) == RANK * len(ranks) and len(set(ranks.values())) > 1
    adapter: Any = parts.run.adapter
    assert adapter.rank_pattern == {path: rank for path, rank in ranks.items() if rank != RANK}
    for path, layer in layers.items():
        assert angles(layer.lora_a.detach(), decomposed[path][2][: layer.rank]).min() > 1 - 1e-5
        assert not layer.lora_b.any() and layer.scale == 3 * RANK / layer.rank


def test_ranks_are_moved_by_share() -> None:
    shares = {"a": torch.tensor([0.9, 0.05, 0.01]), "b": torch.tensor([0.4, 0.3, 0.2]), "c": torch.tensor([1e-3, 0.0])}
    assert move_ranks(shares, dict.fromkeys("abc", 2), 2.0) == {"a": 2, "b": 3, "c": 1}
    assert move_ranks(shares, dict.fromkeys("abc", 2), 1.0) == {"a": 2, "b": 2, "c": 2}


def test_what_rounding_took(tmp_path: Path) -> None:
    """LoftQ gives back the principal directions of the residual, as PEFT's function for a base that is NF4 already."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    parts = assembled(tmp_path, "loftq", base="nf4")
    original = assembled(tmp_path, "kaiming").model
    for path, layer in adapters.lora_modules(parts.model).items():
        assert isinstance(layer.base, QuantLinear) and layer.initial_a is None and not layer.starts_at_base
        weight = original.get_submodule(f"{path}.base").get_parameter("weight").detach()
        residual = weight - layer.base.decode(torch.float32)
        found = _low_rank_decomposition(residual, reduced_rank=RANK)
        torch.testing.assert_close(layer.delta(), found["L"] @ found["R"], rtol=1e-4, atol=1e-6)
        assert (residual - layer.delta()).norm() < residual.norm()


@pytest.mark.parametrize(
    "init", ["eva", *(pytest.param(init, marks=pytest.mark.sweep) for init in ("lora_ga", "loftq"))]
)
def test_a_resumed_run_reads_no_data_again(init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = {"kind": "lora", "rank": 2, "init": init}
    config = config_of(
        tmp_path, Point("llama", "packed", {"kind": "dpo"}, {"adapter": adapter, "base": {"format": "nf4"}})
    )
    whole = Run.model_validate({**config, "output": str(tmp_path / "whole")})
    flow.finetune(whole)
    cut = Run.model_validate({**config, "output": str(tmp_path / "cut")})
    half = copy.deepcopy(config) | {"output": str(tmp_path / "cut")}
    steps: list[int] = []

    def stop(event: Any) -> None:
        if type(event).__name__ == "Saved" and event.kind == "checkpoint":
            steps.append(event.step)
            raise KeyboardInterrupt

    with pytest.raises(BaseException, match=r"step|Stopped"):
        flow.finetune(Run.model_validate(half), stop)
    assert steps == [2]
    monkeypatch.setattr(calibration, "_undisturbed", None)  # what reads data
    flow.finetune(cut)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
