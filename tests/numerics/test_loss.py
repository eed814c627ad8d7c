"""``linear_cross_entropy`` against ``F.cross_entropy`` in float64: loss and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ingle.kernels.layers.cross_entropy import IGNORE_INDEX, linear_cross_entropy, linear_logps

V, H = 301, 24


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the materialised formula in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, *([] if bias is None else [bias]))]
    logits = leaves[0] @ leaves[1].t()
    if bias is not None:
        logits = logits + leaves[2]
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, list(torch.autograd.grad(loss * 0.7, leaves))


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
def test_loss_and_gradients(
    dtype: torch.dtype, n: int, chunk: int | None, bias: bool, scale: float, softcap: float | None
) -> None:
    hidden, weight, targets, offset = make(n, dtype, bias)
    leaves = [t.requires_grad_() for t in (hidden, weight, *([] if offset is None else [offset]))]
    loss = linear_cross_entropy(
        hidden, weight, targets, bias=offset, logit_scale=scale, softcap=softcap, chunk_size=chunk
    )
    gradients = torch.autograd.grad(loss * 0.7, leaves)
    expected, expected_gradients = reference(hidden, weight, targets, offset, scale, softcap)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[dtype]
    assert abs(loss.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-12


def test_all_rows_ignored_is_zero_loss_with_zero_gradient() -> None:
    hidden, weight, targets, _ = make(9, torch.float32, False)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and not hidden.grad.any()


def test_ignored_rows_do_not_reach_the_product() -> None:
    """A NaN in a row without loss must stay there."""
    hidden, weight, targets, _ = make(32, torch.float32, False)
    hidden[targets == IGNORE_INDEX] = float("nan")
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None
    assert hidden.grad.isfinite().all() and not hidden.grad[targets == IGNORE_INDEX].any()


def test_a_nan_in_a_supervised_row_is_told() -> None:
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
    """Chunks are summed in float32: many small chunks must not lose what one big one has."""
    hidden, weight, targets, _ = make(256, torch.bfloat16, False)
    head = weight.float().requires_grad_()
    many, one = (
        torch.autograd.grad(linear_cross_entropy(hidden, head, targets, chunk_size=size), head)[0] for size in (1, 256)
    )
    assert many.dtype == torch.float32
    assert (many - one).norm() <= 3e-3 * one.norm()


def test_logps_are_minus_the_losses() -> None:
    hidden, weight, targets, bias = make(50, torch.float32, True)
    logps = linear_logps(hidden, weight, targets, bias=bias, chunk_size=8)
    expected = -F.cross_entropy(hidden @ weight.t() + bias, targets, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
