"""A trained tensor that does not move in the first steps is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ingle.config import OptimConfig
from ingle.config.adapter import AdapterConfig, LoraAdapter, NoAdapter
from ingle.errors import NotTrained
from ingle.events import Event
from ingle.parallel import Mesh
from ingle.training.movement import Movement
from ingle.training.optim import Optimizer, ParameterGroup
from ingle.training.schedule import learning_rate

NAMES = (
    *("layers.0.q.lora_a", "layers.0.q.lora_b", "layers.1.q.lora_a", "layers.1.q.lora_b"),
    *("layers.0.global.lora_a", "layers.1.global.lora_a", "pooler.weight", "layers.0.experts.3.lora_b"),
)
WILDCARD = LoraAdapter(kind="lora")
CONSTANT = {"schedule": "constant", "warmup_steps": 0, "lr": 1e-3}


def _train(
    still: set[str],
    adapter: AdapterConfig = WILDCARD,
    *,
    num_steps: int = 20,
    start: float = 0.02,
    idle: Sequence[str] = (),
    **options: Any,
) -> list[Event]:
    """Trains tensors, of which no gradient reaches some; returns the warnings."""
    config = OptimConfig(**(CONSTANT | options))
    parameters = {name: nn.Parameter(torch.full((3, 2), start)) for name in NAMES}
    optimizer = Optimizer([ParameterGroup(tuple(parameters.items()), 1.0, 0.0)], config)
    mesh = Mesh(torch.device("cpu"))
    movement = Movement(optimizer, config, num_steps, adapter=adapter, mesh=mesh, idle=idle)
    events: list[Event] = []
    for step in range(1, num_steps + 1):
        for number, (name, parameter) in enumerate(parameters.items()):
            if name not in still:
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            elif number % 2:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step(learning_rate(config, step, num_steps))
        movement.check(step, events.append)
    return events


def test_a_run_in_which_everything_moves_passes() -> None:
    assert not _train(set())


@pytest.mark.parametrize("num_steps", [3, 20])
def test_a_tensor_without_gradient_is_named_after_ten_steps(num_steps: int) -> None:
    with pytest.raises(NotTrained, match=f"1 of 8 .* first {min(num_steps, 10)} steps") as refused:
        _train({"layers.1.q.lora_b"}, num_steps=num_steps)
    assert refused.value.where == "layers.1.q.lora_b" and refused.value.why == "no gradient reached them"
    with pytest.raises(NotTrained, match="8 of 8"):
        _train(set(NAMES))


def test_a_tensor_that_the_loss_cannot_move_is_not_missed() -> None:
    assert not _train({"layers.1.q.lora_b"}, idle=("layers.1.q.lora_b",))


def test_what_an_objective_does_not_use_is_a_warning_unless_the_config_names_it() -> None:
    unused = {"layers.0.global.lora_a", "layers.1.global.lora_a", "layers.0.experts.3.lora_b"}
    (warning,) = _train(unused)
    assert "No gradient reaches 3 trained tensors" in str(warning)
    named = LoraAdapter(kind="lora", target_modules=("q", "global"), trainable_modules=("pooler",))
    with pytest.raises(NotTrained, match="2 of 8"):
        _train(unused, named)
    with pytest.raises(NotTrained, match="1 of 8"):
        _train({"pooler.weight"}, named)
    (warning,) = _train({"layers.1.q.lora_b"}, NoAdapter(kind="none"))
    assert "layers.1.q.lora_b" in str(warning)


def test_updates_that_round_to_zero_are_an_error_after_the_warmup() -> None:
    with pytest.raises(NotTrained, match="8 of 8") as refused:
        _train(set(), start=1.0, lr=1e-9)
    assert refused.value.why == "all of their updates round to zero"
    assert not _train(set(), start=1.0, lr=1e-7, warmup_steps=90, num_steps=100)


def test_runs_of_two_updates_are_not_checked() -> None:
    """The gradient of LoRA's A is zero in the first step, and before a value head of zeros in the second one, too."""
    assert not _train(set(NAMES[:1]), num_steps=2)
    assert not _train(set(NAMES[:1]), num_steps=3, schedule="linear")


def test_equal_changes_in_different_places_do_not_cancel() -> None:
    config = OptimConfig(**CONSTANT)
    weight = nn.Parameter(torch.ones(70000))
    optimizer = Optimizer([ParameterGroup((("weight", weight),), 1.0, 0.0)], config)
    movement = Movement(optimizer, config, 3, adapter=WILDCARD, mesh=Mesh(torch.device("cpu")))
    weight.grad = torch.zeros_like(weight)
    weight.grad[0], weight.grad[5] = 1.0, -1.0
    for step in (1, 2, 3):
        optimizer.step(1e-3)
        weight.grad = torch.zeros_like(weight)
        movement.check(step, print)
