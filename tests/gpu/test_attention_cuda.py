"""Packed attention on a CUDA device against the CPU in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ingle.kernels.attention.packed import attend_by_document, packed_attention
from ingle.kernels.attention.tree_attention import tree_attention
from ingle.kernels.attention.trees import Trees

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap, has_sinks", [(None, False), (5.0, False), (None, True), (5.0, True)])
def test_packed_attention(causal: bool, window: int | None, softcap: float | None, has_sinks: bool) -> None:
    lengths = [5, 130, 1, 64]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    options = {"scale": 0.2, "causal": causal, "window": window, "softcap": softcap}
    shapes = ((1, 4, 200, 64), (1, 2, 200, 64), (1, 2, 200, 64))
    exact = [torch.randn(shape).bfloat16().float().requires_grad_() for shape in shapes]
    exact += [torch.linspace(-2, 4, 4).bfloat16().float().requires_grad_()] if has_sinks else []
    ours = [t.detach().bfloat16().cuda().requires_grad_() for t in exact]
    grad = torch.randn(1, 200, 4, 64).bfloat16()
    wanted = attend_by_document(*exact[:3], bounds, **options, sinks=exact[3] if has_sinks else None)
    out = packed_attention(*ours[:3], bounds.cuda(), **options, sinks=ours[3] if has_sinks else None)
    pairs = [(out, wanted)]
    gradients = torch.autograd.grad(out, ours, grad.cuda()), torch.autograd.grad(wanted, exact, grad.float())
    pairs += list(zip(*gradients, strict=True))
    for actual, reference in pairs:
        assert (actual.cpu().float() - reference).norm() <= 1.5e-2 * reference.norm()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("softcap, has_sinks", [(None, False), (5.0, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tree_attention(dtype: torch.dtype, window: int | None, softcap: float | None, has_sinks: bool) -> None:
    """Two runs give the same bits, though several answers add to the gradients of a prompt."""
    trees = Trees.of([0, 300, 429, 434, 500, 520, 530, 700], [-1, 0, 0, 0, -1, 4, 4])
    assert trees is not None
    options: dict[str, Any] = {"scale": 0.2, "window": window, "softcap": softcap}
    shapes = ((1, 4, 700, 64), (1, 2, 700, 64), (1, 2, 700, 64))
    exact = [torch.randn(shape).to(dtype).float().requires_grad_() for shape in shapes]
    exact += [torch.linspace(-2, 4, 4).to(dtype).float().requires_grad_()] if has_sinks else []
    grad = torch.randn(1, 700, 4, 64).to(dtype)
    runs = []
    for _ in range(2):
        ours = [t.detach().to(dtype).cuda().requires_grad_() for t in exact]
        out = tree_attention(*ours[:3], trees, **options, sinks=ours[3] if has_sinks else None)
        runs.append((out, *torch.autograd.grad(out, ours, grad.cuda())))
    wanted = tree_attention(*exact[:3], trees, **options, sinks=exact[3] if has_sinks else None)
    expected = (wanted, *torch.autograd.grad(wanted, exact, grad.float()))
    for first, second, reference in zip(*runs, expected, strict=True):
        assert torch.equal(first, second)
        tolerance = 1.5e-2 if dtype == torch.bfloat16 else 1e-3
        assert (first.cpu().float() - reference).norm() <= tolerance * reference.norm()
