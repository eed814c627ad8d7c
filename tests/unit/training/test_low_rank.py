"""GaLore and APOLLO against the published algorithms, written out in float64 as their authors' code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ingle.config import OptimConfig
from ingle.training.low_rank import LowRank
from ingle.training.optim import Optimizer, ParameterGroup

SHAPES = {"tall": (12, 7), "wide": (6, 10), "vector": (9,)}


def _optimizer(parameters: dict[str, nn.Parameter], config: OptimConfig) -> Optimizer:
    low_rank = LowRank(["tall", "wide"], config.rule, config, seed=3)  # type: ignore[arg-type]
    return Optimizer([ParameterGroup(tuple(parameters.items()), 1.0, 0.0)], config, low_rank=low_rank)


def _config(**rule: Any) -> OptimConfig:
    return OptimConfig.model_validate({"rule": rule, "lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8})


def _draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def _gradients(step: int) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in _draw(100 + step).items()}


def _run(optimizer: Optimizer, parameters: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        for name, gradient in _gradients(step).items():
            (parameters[name].float() * gradient).sum().backward()
        optimizer.step(1e-2)
        optimizer.clear()


def _adam(state: dict[str, Any], value: Tensor) -> Tensor:
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.8 * state.get("m", 0) + 0.2 * value
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * value**2
    return (state["m"] / (1 - 0.8 ** state["t"])) / ((state["v"] / (1 - 0.95 ** state["t"])).sqrt() + 1e-8)


def test_galore_follows_the_published_algorithm() -> None:
    config = _config(kind="galore", rank=3, update_every=2, scale=0.5)
    parameters = _draw(0)
    expected = {name: value.detach().double() for name, value in parameters.items()}
    optimizer = _optimizer(parameters, config)
    states: dict[str, dict[str, Any]] = {name: {} for name in SHAPES}
    for step in range(1, 6):
        _run(optimizer, parameters, step, step)
        for name, gradient in _gradients(step).items():
            state, grad = states[name], gradient.double()
            if name == "vector":
                expected[name] -= 1e-2 * _adam(state, grad)
                continue
            if (step - 1) % 2 == 0:
                u, _, vh = torch.linalg.svd(grad, full_matrices=False)
                directions = vh[:3].T if name == "tall" else u[:, :3]
                found = optimizer.state_dict()[f"projection.{name}"].double()
                state["p"] = directions * (directions * found).sum(0).sign()  # a decomposition does not fix signs
            if name == "tall":  # galore_torch, proj_type "std": the right side of a tall gradient
                expected[name] -= 1e-2 * 0.5 * _adam(state, grad @ state["p"]) @ state["p"].T
            else:
                expected[name] -= 1e-2 * 0.5 * state["p"] @ _adam(state, state["p"].T @ grad)
    for name in SHAPES:
        torch.testing.assert_close(parameters[name].detach().double(), expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["apollo", "apollo_mini"])
def test_apollo_follows_the_published_algorithm(kind: str) -> None:
    config = _config(kind=kind, rank=3, update_every=2, scale=4.0)
    parameters = _draw(0)
    optimizer = _optimizer(parameters, config)
    expected = {name: value.detach().double() for name, value in parameters.items()}
    low_rank = optimizer._low_rank
    assert low_rank is not None
    states: dict[str, dict[str, Any]] = {name: {} for name in ("tall", "wide")}
    for step in range(1, 6):
        for name, state in states.items():
            grad = _gradients(step)[name].double()
            smaller = min(grad.shape)
            basis = low_rank._basis(name, {"step": torch.tensor(step - 1.0)}, torch.zeros(1, smaller)).double()
            if name == "tall":
                projected, dim = grad @ basis, 1
            else:
                projected, dim = basis.T @ grad, 0
            direction = _adam(state, projected)
            if kind == "apollo":
                change = grad * (direction.norm(dim=dim, keepdim=True) / projected.norm(dim=dim, keepdim=True))
            else:
                change = grad * (direction.norm() / projected.norm())
            norm = change.norm()
            if "norm" in state:
                limiter = max(norm / state["norm"], 1.01) / 1.01
                change, norm = change / limiter, norm / limiter
            state["norm"] = norm
            expected[name] -= 1e-2 * 2.0 * change
    _run(optimizer, parameters, 1, 5)
    for name in states:
        torch.testing.assert_close(parameters[name].detach().double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["galore", "apollo", "apollo_mini"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    config = _config(kind=kind, rank=2, update_every=2)
    whole, half, fresh = _draw(0, dtype), _draw(0, dtype), _draw(1, dtype)
    _run(_optimizer(whole, config), whole, 1, 6)
    first = _optimizer(half, config)
    _run(first, half, 1, 3)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    assert "exp_avg.tall" in state
    assert state["exp_avg.tall"].shape == (12, 2)
    continued = _optimizer(fresh, config)
    continued.load_state_dict(state)
    _run(continued, fresh, 4, 6)
    assert all(torch.equal(fresh[name], whole[name]) for name in SHAPES)


@pytest.mark.parametrize("kind", ["galore", "apollo"])
def test_the_size_of_a_checkpoint_is_known_before_the_first_step(kind: str) -> None:
    config = _config(kind=kind, rank=2)
    parameters = _draw(0)
    optimizer = _optimizer(parameters, config)
    predicted = optimizer.checkpoint_bytes
    _run(optimizer, parameters, 1, 1)
    scalars = 4 * len(SHAPES) + 4 * 2 * (kind == "apollo")  # counts of steps, last norms
    assert sum(value.nbytes for value in optimizer.state_dict().values()) == predicted + scalars


def test_weight_decay_is_decoupled() -> None:
    config = _config(kind="galore", rank=2)
    plain, decayed = _draw(0), _draw(0)
    for parameters, decay in ((plain, 0.0), (decayed, 0.5)):
        low_rank = LowRank(["tall", "wide"], config.rule, config, seed=3)  # type: ignore[arg-type]
        optimizer = Optimizer([ParameterGroup(tuple(parameters.items()), 1.0, decay)], config, low_rank=low_rank)
        _run(optimizer, parameters, 1, 1)
    start = _draw(0)["tall"]
    torch.testing.assert_close(plain["tall"] - decayed["tall"], 1e-2 * 0.5 * start, rtol=1e-4, atol=1e-6)
