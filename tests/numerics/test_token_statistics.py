"""Log-probabilities, entropies and sums of squares from hidden states, against the softmax."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import IGNORE_INDEX
from ingle.kernels.layers.token_logps import token_logps
from ingle.kernels.layers.token_statistics import token_statistics


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_figures_are_those_of_the_softmax(dtype: torch.dtype, softcap: float | None) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 8), torch.randn(50, 8), torch.randn(50)
    targets = torch.randint(50, (9,))
    targets[[2, 5]] = IGNORE_INDEX
    inputs = hidden.to(dtype), weight.to(dtype), targets
    found = token_statistics(*inputs, bias=bias.to(dtype), logit_scale=0.7, softcap=softcap, chunk_size=3)
    raw = (inputs[0] @ inputs[1].T + bias.to(dtype)).double() * 0.7
    logps = (raw if softcap is None else softcap * torch.tanh(raw / softcap)).log_softmax(-1)
    kept = targets != IGNORE_INDEX
    expected = (
        logps.gather(1, targets.clamp_min(0)[:, None])[:, 0] * kept,
        -(logps.exp() * logps).sum(1) * kept,
        (logps.exp() ** 2).sum(1).log() * kept,
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    for name, own, other in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_are_those_of_the_log_probabilities_alone() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, requires_grad=True)
    weight = torch.randn(11, 4, requires_grad=True)
    targets, scale = torch.tensor([3, IGNORE_INDEX, 0, 10, 7]), torch.randn(5)
    found = token_statistics(hidden, weight, targets)
    own = torch.autograd.grad((found.logps * scale).sum(), (hidden, weight))
    other = torch.autograd.grad((token_logps(hidden, weight, targets) * scale).sum(), (hidden, weight))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    assert not found.entropies.requires_grad and not found.log_squares.requires_grad


def test_logits_of_minus_infinity_have_no_probability() -> None:
    weight = torch.eye(4)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    found = token_statistics(torch.zeros(1, 4), weight, torch.tensor([1]), bias=bias)
    log3 = torch.tensor([3.0]).log()
    torch.testing.assert_close(found.entropies, log3)
    torch.testing.assert_close(found.log_squares, -log3)
