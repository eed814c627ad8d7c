"""LoRA-FA's preconditioner makes the change of a weight the projection of its gradient."""

from __future__ import annotations

import torch
from torch import nn

from ingle.adapters import LoraLinear
from ingle.config import OptimConfig
from ingle.config.adapter import LoraAdapter
from ingle.training.groups import _preconditions
from ingle.training.optim import Optimizer, ParameterGroup


def test_the_change_follows_the_gradient_of_the_weight() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"q": LoraLinear(nn.Linear(9, 6, bias=False), rank=3, scale=2.0)})
    layer: LoraLinear = model["q"]  # type: ignore[assignment]
    layer.initialize(0, "q")
    layer.lora_a.requires_grad_(False)
    found = _preconditions(model, LoraAdapter(rank=3, freeze_a=True, precondition=True))
    assert list(found) == ["q.lora_b"]

    gradient = torch.randn(6, 9)  # of the weight
    (layer.lora_b @ layer.lora_a * layer.scale * gradient).sum().backward()
    group = ParameterGroup((("q.lora_b", layer.lora_b),), 1.0, 0.0)
    optimizer = Optimizer([group], OptimConfig(lr=1e-2, max_grad_norm=None), precondition=found)
    optimizer.step(1e-2)
    preconditioned = dict(optimizer.gradients())["q.lora_b"]
    a = layer.lora_a.detach()
    expected = gradient @ torch.linalg.pinv(a) @ a  # onto the rows of A
    torch.testing.assert_close(layer.scale * preconditioned @ a, expected, rtol=1e-4, atol=1e-5)
    assert not _preconditions(model, LoraAdapter(rank=3, freeze_a=True))
