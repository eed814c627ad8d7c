"""LISA trains the layers that it draws, and what is outside of the layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ingle.config import OptimConfig
from ingle.config.optim import Lisa
from ingle.training.lisa import LayerSampling
from ingle.training.optim import Optimizer, ParameterGroup

LAYERS = 5
RULE = Lisa(kind="lisa", active=2, every=3)
CONFIG = OptimConfig(rule=RULE, lr=1e-2, max_grad_norm=None)


def _model(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    names = ["embed", *(f"layers.{number}" for number in range(LAYERS))]
    return {name: nn.Parameter(torch.randn(6, generator=generator).to(dtype)) for name in names}


def _optimizer(model: dict[str, nn.Parameter]) -> LayerSampling:
    layer_of = {f"layers.{number}": number for number in range(LAYERS)}
    return LayerSampling([ParameterGroup(tuple(model.items()), 1.0, 0.0)], CONFIG, RULE, layer_of, seed=7)


def _train(optimizer: LayerSampling, model: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last + 1):
        optimizer.begin(step)
        generator = torch.Generator().manual_seed(step)
        torch.stack([(p.float() * torch.randn(6, generator=generator)).sum() for p in model.values()]).sum().backward()
        optimizer.sum_gradients()
        optimizer.clip()
        optimizer.step(1e-2)
        optimizer.clear()


def test_only_drawn_layers_change_and_only_they_have_masters() -> None:
    model = _model(torch.bfloat16)
    optimizer = _optimizer(model)
    drawn = set[int]()
    for period in range(12):
        before = {name: value.detach().clone() for name, value in model.items()}
        _train(optimizer, model, 3 * period + 1, 3 * period + 3)
        chosen = optimizer.draw(period)
        drawn |= set(chosen)
        changed = {name for name, value in model.items() if not torch.equal(value, before[name])}
        assert changed == {"embed", *(f"layers.{number}" for number in chosen)}
        trained = {name for name in optimizer.state_dict() if name.startswith("exp_avg.")}
        assert trained == {f"exp_avg.{name}" for name in changed}
        assert optimizer.resting() == model.keys() - changed  # three updates have been made
    assert drawn == set(range(LAYERS))


def test_what_is_outside_of_the_layers_is_trained_as_by_adamw() -> None:
    model, alone = _model(torch.bfloat16), _model(torch.bfloat16)
    _train(_optimizer(model), model, 1, 7)
    plain = Optimizer([ParameterGroup((("embed", alone["embed"]),), 1.0, 0.0)], CONFIG)
    for step in range(1, 8):
        generator = torch.Generator().manual_seed(step)
        (alone["embed"].float() * torch.randn(6, generator=generator)).sum().backward()
        plain.step(1e-2)
        plain.clear()
    assert torch.equal(model["embed"], alone["embed"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [2, 3, 5])
def test_restored_state_continues_bit_for_bit(dtype: torch.dtype, stop: int) -> None:
    whole, half, fresh = (_model(dtype) for _ in range(3))
    _train(_optimizer(whole), whole, 1, 8)
    first = _optimizer(half)
    _train(first, half, 1, stop)
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in first.state_dict().items()}
    sizes = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    assert sizes <= first.checkpoint_bytes + 4 * len(state)
    continued = _optimizer(fresh)
    continued.load_state_dict(state)
    _train(continued, fresh, stop + 1, 8)
    assert all(torch.equal(fresh[name], whole[name]) for name in whole)
