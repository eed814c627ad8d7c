"""Divergences of a student from a teacher: values, gradients and chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ingle.kernels import IGNORE_INDEX
from ingle.kernels.layers.divergence import Predictions, linear_divergence
from ingle.kernels.layers.logits import LogitTransform
from ingle.objectives.policy_losses import divergence

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
#: Of S = (.6, .3, .1) and T = (.2, .5, .3).
GOLDENS = {0.0: 0.36527404, 1.0: 0.39605846, 0.5: 0.09112080, 0.1: 0.03263250, 0.9: 0.03476123}


def made(dtype: torch.dtype = torch.float64, *, trained: bool = True) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 5), (17, 5), (17,), (9, 7), (17, 7), (17,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets = torch.arange(9)
    targets[[2, 8]] = IGNORE_INDEX
    return [tensor.requires_grad_(trained) for tensor in tensors[:3]], tensors[3:], targets


@pytest.mark.parametrize(("beta", "expected"), GOLDENS.items())
def test_values_of_three_tokens(beta: float, expected: float) -> None:
    student, teacher = (torch.tensor(p, dtype=torch.float64).log()[:, None] for p in ((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)))
    one = torch.ones(1, 1, dtype=torch.float64)
    found = linear_divergence(Predictions(one, student), Predictions(one, teacher), torch.tensor([0]), beta)
    assert found.item() == pytest.approx(expected, abs=5e-9)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_are_those_of_the_whole_distributions(beta: float, softcap: float | None) -> None:
    own, other, targets = made()
    transforms = LogitTransform(0.8, softcap).at(0.9), LogitTransform(1.3).at(0.9)
    student, teacher = Predictions(*own, transforms[0]), Predictions(*other, transforms[1])
    upstream = torch.linspace(-1, 2, 9, dtype=torch.float64)
    found = linear_divergence(student, teacher, targets, beta, chunk_size=3)
    logps = [
        transform(hidden @ weight.T + bias)[0].log_softmax(-1)
        for (hidden, weight, bias), transform in zip((own, other), transforms, strict=True)
    ]
    expected = divergence(logps[0], logps[1], beta) * (targets != IGNORE_INDEX)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(values, own, upstream) for values in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("beta", BETAS)
def test_gradients_are_those_of_differences(beta: float) -> None:
    own, other, targets = made()
    teacher = Predictions(*other)

    def run(*tensors: Tensor) -> Tensor:
        return linear_divergence(Predictions(*tensors), teacher, targets, beta, chunk_size=4)

    assert torch.autograd.gradcheck(run, own)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype: torch.dtype, beta: float) -> None:
    own, other, targets = made(dtype)
    wide = [[tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in part] for part in (own, other)]
    results = []
    for student, teacher in ((own, other), wide):
        values = linear_divergence(Predictions(*student), Predictions(*teacher), targets, beta)
        results.append([values.detach().double(), *torch.autograd.grad(values.sum(), student)])
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=tolerance, atol=tolerance)


def test_a_student_that_agrees_is_at_rest() -> None:
    own, _, targets = made()
    for beta in BETAS:
        teacher = Predictions(*(tensor.detach().clone() for tensor in own))
        values = linear_divergence(Predictions(*own), teacher, targets, beta)
        gradients = torch.autograd.grad(values.sum(), own)
        assert float(values.detach().abs().max()) < 1e-14
        assert all(float(gradient.abs().max()) < 1e-13 for gradient in gradients)


def test_tokens_that_both_rule_out_count_for_nothing() -> None:
    own, other, targets = made()
    own[2].data[3], other[2][3] = -torch.inf, -torch.inf
    for beta in BETAS:
        values = linear_divergence(Predictions(*own), Predictions(*other), targets, beta)
        (gradient,) = torch.autograd.grad(values.sum(), own[0])
        assert values.isfinite().all() and gradient.isfinite().all()


def test_only_what_is_trained_has_a_gradient() -> None:
    own, other, targets = made()
    own[1].requires_grad_(False)
    own[2].requires_grad_(False)
    values = linear_divergence(Predictions(*own), Predictions(*other), targets, 0.5)
    values.sum().backward()
    assert own[0].grad is not None and own[1].grad is None
    nothing = linear_divergence(Predictions(*own), Predictions(*other), torch.full_like(targets, IGNORE_INDEX), 0.5)
    nothing.sum().backward()
    assert not nothing.any()
