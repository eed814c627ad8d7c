"""``linear_cross_entropy`` and ``token_logps`` against float64 autograd through the materialised logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ingle.kernels import IGNORE_INDEX
from ingle.kernels.layers.cross_entropy import linear_cross_entropy
from ingle.kernels.layers.token_logps import token_logps

V, H = 301, 24


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the materialised formula in float64, and the leaves to differentiate in."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, *([] if bias is None else [bias]))]
    logits = leaves[0] @ leaves[1].t()
    if bias is not None:
        logits = logits + leaves[2]
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none"), leaves


def make(n: int, dtype: torch.dtype, bias: bool, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(n)
    hidden = (torch.randn(n, H, generator=generator) * 2).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    targets = torch.randint(V, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, weight, targets, torch.randn(V, generator=generator).to(dtype) if bias else None


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n, chunk", [(1, None), (17, 1), (64, 16), (65, 16), (63, 64)])
@pytest.mark.parametrize("bias, scale, softcap", [(False, 1.0, None), (True, 1.0, None), (True, 0.25, 5.0)])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_values_and_gradients(
    dtype: torch.dtype, n: int, chunk: int | None, bias: bool, scale: float, softcap: float | None, ignored: float
) -> None:
    hidden, weight, targets, offset = make(n, dtype, bias, ignored)
    leaves = [t.requires_grad_() for t in (hidden, weight, *([] if offset is None else [offset]))]
    options = {"bias": offset, "logit_scale": scale, "softcap": softcap, "chunk_size": chunk}
    loss = linear_cross_entropy(hidden, weight, targets, **options)
    logps = token_logps(hidden, weight, targets, **options)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(n))
    expected, exact = reference(hidden, weight, targets, offset, scale, softcap)
    tolerance = TOLERANCE[dtype]
    for ours, theirs, gradient in ((loss, -expected.sum(), 0.7), (logps, expected, upstream)):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1.0)
        gradient = torch.as_tensor(gradient, dtype=torch.float64)
        actual = torch.autograd.grad(ours, leaves, gradient.to(ours.dtype))
        wanted = torch.autograd.grad(theirs, exact, gradient, retain_graph=True)
        for one, other in zip(actual, wanted, strict=True):
            assert one.dtype == dtype
            assert (one.double() - other).norm() <= tolerance * other.norm() + 1e-12
    assert not logps[targets == IGNORE_INDEX].any()
    torch.testing.assert_close(-logps.sum(), loss, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_logps_pass_gradcheck(softcap: float | None) -> None:
    hidden, weight, targets, bias = make(7, torch.float64, True)
    hidden, weight, bias = hidden[:, :5], weight[:11, :5], bias[:11]
    targets = torch.where(targets == IGNORE_INDEX, targets, targets % 11)

    def function(*leaves: Tensor) -> Tensor:
        options = {"bias": leaves[2], "logit_scale": 0.5, "softcap": softcap, "chunk_size": 3}
        return token_logps(leaves[0], leaves[1], targets, **options)

    assert torch.autograd.gradcheck(function, tuple(t.clone().requires_grad_() for t in (hidden, weight, bias)))


def test_token_logps_differentiate_only_what_needs_it() -> None:
    hidden, weight, targets, _ = make(20, torch.float32, False)
    head = weight.requires_grad_()
    (gradient,) = torch.autograd.grad(token_logps(hidden, head, targets).sum(), head)
    (expected,) = torch.autograd.grad(-linear_cross_entropy(hidden, head, targets), head)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not token_logps(hidden, head, targets).requires_grad


def test_all_rows_ignored_is_zero_loss_with_zero_gradient() -> None:
    hidden, weight, targets, _ = make(9, torch.float32, False)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize("function", [linear_cross_entropy, token_logps])
def test_ignored_rows_do_not_reach_the_product(function: Any) -> None:
    """NaN in a row without a target does not spread."""
    hidden, weight, targets, _ = make(32, torch.float32, False)
    hidden[targets == IGNORE_INDEX] = float("nan")
    hidden.requires_grad_()
    loss = function(hidden, weight, targets).sum()
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None
    assert hidden.grad.isfinite().all() and not hidden.grad[targets == IGNORE_INDEX].any()


def test_a_nan_in_a_supervised_row_reaches_the_loss() -> None:
    hidden, weight, targets, _ = make(32, torch.float32, False, ignored=0)
    hidden[3, 5] = float("nan")
    assert linear_cross_entropy(hidden, weight, targets).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_far_apart_neither_overflow_nor_lose_the_loss(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[200.0, -200.0], [-150.0, 150.0]], dtype=dtype)
    weight = torch.eye(2, dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(400.0)


def test_chunks_do_not_change_the_loss() -> None:
    hidden, weight, targets, _ = make(100, torch.float32, False)
    losses = [linear_cross_entropy(hidden, weight, targets, chunk_size=size).item() for size in (1, 7, 100, 1000)]
    assert max(losses) - min(losses) <= 1e-6 * max(losses)


def test_a_trained_float32_head_under_bfloat16_keeps_a_float32_gradient() -> None:
    """Chunks are summed in float32, so many small chunks are as exact as one large chunk."""
    hidden, weight, targets, _ = make(256, torch.bfloat16, False)
    head = weight.float().requires_grad_()
    many, one = (
        torch.autograd.grad(linear_cross_entropy(hidden, head, targets, chunk_size=size), head)[0] for size in (1, 256)
    )
    assert many.dtype == torch.float32
    assert (many - one).norm() <= 3e-3 * one.norm()
