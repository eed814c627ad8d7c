"""AdamW with master weights against a float64 oracle, and its state round trip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ingle.config import OptimConfig
from ingle.training.optim import Optimizer, ParameterGroup


def _optimizer(parameters: dict[str, nn.Parameter], config: OptimConfig, **options: float) -> Optimizer:
    group = ParameterGroup(tuple(parameters.items()), options.get("lr_ratio", 1.0), options.get("weight_decay", 0.0))
    return Optimizer([group], config)


def _adamw_float64(
    weight: torch.Tensor, gradients: list[torch.Tensor], config: OptimConfig, decay: float
) -> torch.Tensor:
    """Algorithm 2 of arXiv 1711.05101, written out."""
    weight = weight.double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first = config.betas[0] * first + (1 - config.betas[0]) * gradient.double()
        second = config.betas[1] * second + (1 - config.betas[1]) * gradient.double() ** 2
        corrected_first = first / (1 - config.betas[0] ** step)
        corrected_second = second / (1 - config.betas[1] ** step)
        weight -= config.lr * decay * weight
        weight -= config.lr * corrected_first / (corrected_second.sqrt() + config.eps)
    return weight


def test_adamw_follows_the_published_algorithm() -> None:
    config = OptimConfig(lr=1e-2, betas=(0.9, 0.95))
    parameter = nn.Parameter(torch.randn(7, 5))
    start = parameter.detach().clone()
    gradients = [torch.randn(7, 5) for _ in range(6)]
    optimizer = _optimizer({"w": parameter}, config, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step(config.lr)
        optimizer.clear()
    torch.testing.assert_close(
        parameter.detach().double(), _adamw_float64(start, gradients, config, 0.1), rtol=1e-5, atol=1e-6
    )


def test_updates_smaller_than_bfloat16_spacing_are_not_lost() -> None:
    config = OptimConfig(lr=1e-4)
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = _optimizer({"w": parameter}, config)
    for _ in range(100):
        (parameter.float().sum()).backward()
        optimizer.step(config.lr)
        optimizer.clear()
    # 100 steps of 1e-4 against a constant gradient move the weight by 0.01; a single step is 40 times below the spacing
    torch.testing.assert_close(parameter.float(), torch.full((4,), 0.99), rtol=0, atol=4e-3)


def test_gradients_of_micro_batches_are_summed_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = _optimizer({"w": parameter}, OptimConfig())
    for value in [256.0] + [1.0] * 8:  # bfloat16 would answer 256: each 1 is below its spacing there
        (parameter * value).sum().backward()
    assert dict(optimizer.gradients())["w"].item() == 264.0


def test_clip_returns_the_norm_before_and_scales_to_the_limit() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = _optimizer({"w": parameter}, OptimConfig(max_grad_norm=1.0))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert optimizer.clip() == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=1e-6)


def test_no_clip_when_turned_off() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = _optimizer({"w": parameter}, OptimConfig(max_grad_norm=None))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert optimizer.clip() == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    config = OptimConfig(lr=1e-2)
    gradients = [torch.randn(9) for _ in range(6)]

    def run(first: int, optimizer: Optimizer, parameter: nn.Parameter) -> None:
        for gradient in gradients[first:]:
            (parameter.float() * gradient).sum().backward()
            optimizer.step(config.lr)
            optimizer.clear()

    torch.manual_seed(0)
    start = torch.randn(9).to(dtype)
    whole = nn.Parameter(start.clone())
    run(0, _optimizer({"w": whole}, config), whole)

    half = nn.Parameter(start.clone())
    optimizer = _optimizer({"w": half}, config)
    for gradient in gradients[:3]:
        (half.float() * gradient).sum().backward()
        optimizer.step(config.lr)
        optimizer.clear()
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}

    fresh = nn.Parameter(torch.zeros(9, dtype=dtype))
    continued = _optimizer({"w": fresh}, config)
    continued.load_state_dict(state)
    run(3, continued, fresh)
    assert torch.equal(fresh, whole)


def test_group_learning_rate_ratio() -> None:
    config = OptimConfig(lr=1e-2)
    slow, fast = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Optimizer([ParameterGroup((("a", slow),), 1.0, 0.0), ParameterGroup((("b", fast),), 16.0, 0.0)], config)
    for parameter in (slow, fast):
        parameter.grad = torch.ones(1)
    optimizer.step(config.lr)
    assert fast.item() == pytest.approx(16 * slow.item(), rel=1e-5)
