"""The fused LoRA function against plain eager LoRA in float32 and float64: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ingle.adapters import LoraLinear
from ingle.config.base import Nf4Base
from ingle.kernels.layers.lora import Projection, lora_linears
from ingle.quant import QuantLinear, make_format

I, O, R, N = 64, 48, 4, 30  # noqa: E741
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-6, torch.bfloat16: 1e-2}


def close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert actual.shape == wanted.shape
    error = (actual.double() - wanted.double()).norm()
    assert error <= tolerance * wanted.double().norm() + 1e-12, f"{error / wanted.double().norm():.2e}"


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Equation 3 of the paper."""
    y = x @ weight.t() + scale * (x @ a.t() @ b.t())
    return y if bias is None else y + bias


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_projection(dtype: torch.dtype, with_bias: bool) -> None:
    x = draw(2, N // 2, I, seed=1, dtype=dtype).requires_grad_()
    weight = draw(O, I, seed=2, dtype=dtype)
    bias = draw(O, seed=3, dtype=dtype) if with_bias else None
    master = torch.promote_types(dtype, torch.float32)
    a, b = (draw(*s, seed=i, dtype=master).requires_grad_() for i, s in enumerate([(R, I), (O, R)], 4))
    (y,) = lora_linears(x, [Projection(lambda dtype: weight, bias, a, b, 0.7)])
    grad = draw(*y.shape, seed=6, dtype=dtype)
    ours = torch.autograd.grad(y, (x, a, b), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    wanted = eager(exact[0], weight.double(), None if bias is None else bias.double(), *exact[1:], 0.7)
    theirs = torch.autograd.grad(wanted, exact, grad.double())
    assert y.dtype == dtype and [g.dtype for g in ours] == [dtype, master, master]
    for actual, reference in zip((y, *ours), (wanted, *theirs), strict=True):
        close(actual, reference, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projections_that_share_an_input(dtype: torch.dtype) -> None:
    """Projections of different sizes, ranks and scales give together what each gives alone."""
    x = draw(N, I, seed=1, dtype=dtype).requires_grad_()
    sizes = [(O, 4, 0.5), (16, 2, 2.0), (16, 8, 1.0)]
    weights = [draw(o, I, seed=10 + i, dtype=dtype) for i, (o, _, _) in enumerate(sizes)]
    factors = [
        (draw(r, I, seed=20 + i).requires_grad_(), draw(o, r, seed=30 + i).requires_grad_())
        for i, (o, r, _) in enumerate(sizes)
    ]
    projections = [
        Projection(lambda dtype, w=w: w, None, a, b, s)
        for w, (a, b), (_, _, s) in zip(weights, factors, sizes, strict=True)
    ]
    outputs = lora_linears(x, projections)
    loss = sum((y * draw(*y.shape, seed=40 + i, dtype=dtype)).float().sum() for i, y in enumerate(outputs))
    leaves = [x, *(f for pair in factors for f in pair)]
    ours = torch.autograd.grad(loss, leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    total = torch.zeros((), dtype=torch.double)
    for i, (weight, (_, _, scale)) in enumerate(zip(weights, sizes, strict=True)):
        y = eager(exact[0], weight.double(), None, exact[1 + 2 * i], exact[2 + 2 * i], scale)
        close(outputs[i], y, TOLERANCE[dtype])
        total = total + (y * draw(*y.shape, seed=40 + i, dtype=dtype).double()).sum()
    for actual, reference in zip(ours, torch.autograd.grad(total, exact), strict=True):
        close(actual, reference, TOLERANCE[dtype])


@pytest.mark.parametrize("with_bias", [False, True])
def test_an_output_can_be_modified_in_place(with_bias: bool) -> None:
    """Falcon's layers do this, and RoCBert's with a bias; autograd refuses it for a view."""
    x = draw(2, 3, I, seed=1).requires_grad_()
    a, b = (draw(*shape, seed=2).requires_grad_() for shape in ((4, I), (O, 4)))
    weight = draw(O, I, seed=3)
    bias = draw(O, seed=4) if with_bias else None
    gradients = []
    for in_place in (True, False):
        (y,) = lora_linears(x, [Projection(lambda dtype: weight, bias, a, b, 0.5)])
        y = y.add_(1.0) if in_place else y + 1.0
        gradients.append(torch.autograd.grad(y.square().sum(), (x, a, b)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_input_without_gradient_gets_none() -> None:
    x, weight = draw(N, I, seed=1), draw(O, I, seed=2)
    a, b = draw(R, I, seed=3).requires_grad_(), draw(O, R, seed=4).requires_grad_()
    lora_linears(x, [Projection(lambda dtype: weight, None, a, b, 1.0)])[0].sum().backward()
    assert x.grad is None and a.grad is not None and b.grad is not None
    close(a.grad, torch.ones(N, O).mm(b.detach()).t() @ x, 1e-5)


def bases() -> dict[str, nn.Module]:
    linear, biased = nn.Linear(I, O, bias=False), nn.Linear(I, O)
    conv = Conv1D(O, I)
    nn.init.normal_(conv.bias)
    format = make_format(Nf4Base(format="nf4", block_size=32))
    assert format is not None
    quantized = QuantLinear(format, I, O, bias=True)
    quantized.quantize(linear.weight.detach().bfloat16())
    assert quantized.bias is not None
    quantized.bias.data = draw(O, seed=9)
    return {"linear": linear, "biased": biased, "conv1d": conv, "nf4": quantized}


@pytest.mark.parametrize("kind", ["linear", "biased", "conv1d", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_base(kind: str, dtype: torch.dtype) -> None:
    """The module over each base gives the output of the base plus the eager update, and eager gradients."""
    torch.manual_seed(0)
    base = bases()[kind].to(dtype)
    lora = LoraLinear(base, R, 0.5)
    with torch.no_grad():
        lora.lora_a.copy_(draw(R, I, seed=1))
        lora.lora_b.copy_(draw(O, R, seed=2))
    x = draw(3, N, I, seed=3, dtype=dtype).requires_grad_()
    y = lora(x)
    grad = draw(*y.shape, seed=4, dtype=dtype)
    ours = torch.autograd.grad(y, (x, lora.lora_a, lora.lora_b), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, lora.lora_a, lora.lora_b)]
    change = 0.5 * (exact[0] @ exact[1].t() @ exact[2].t())
    if kind == "nf4":
        assert isinstance(base, QuantLinear) and base.bias is not None
        wanted = exact[0] @ base.decode(torch.float32).double().t() + base.bias.double() + change
    else:
        wanted = base.double()(exact[0]) + change
    theirs = torch.autograd.grad(wanted, exact, grad.double())
    for actual, reference in zip((y, *ours), (wanted, *theirs), strict=True):
        close(actual, reference, TOLERANCE[dtype])
    lora.is_on = False
    base.to(dtype)
    assert torch.equal(lora(x), base(x))


@pytest.mark.parametrize("count", [1, 2])
def test_dropout(count: int) -> None:
    """Outputs and gradients match the mask that the function itself shows."""
    p = 0.4
    x = draw(N, I, seed=1).requires_grad_()
    eyes = [torch.eye(I).requires_grad_() for _ in range(count)]  # A and B as identities show dropout(x)
    zero = torch.zeros(I, I)
    torch.manual_seed(7)
    dropped = lora_linears(x, [Projection(lambda dtype: zero, None, e, torch.eye(I), 1.0, p) for e in eyes])
    masks = [(d.detach() != 0).float() / (1 - p) for d in dropped]
    for d, mask in zip(dropped, masks, strict=True):
        close(d, x * mask, 1e-6)
        assert abs((mask != 0).float().mean() - (1 - p)) < 0.05
    if count == 2:
        assert not torch.equal(masks[0], masks[1])
    weight = draw(O, I, seed=2)
    factors = [(draw(R, I, seed=3 + i).requires_grad_(), draw(O, R, seed=5 + i).requires_grad_()) for i in range(count)]
    torch.manual_seed(7)
    outputs = lora_linears(x, [Projection(lambda dtype: weight, None, a, b, 0.5, p) for a, b in factors])
    leaves = [x, *(f for pair in factors for f in pair)]
    ours = torch.autograd.grad(sum((y**2).sum() for y in outputs), leaves)
    wanted = [x @ weight.t() + 0.5 * ((x * m) @ a.t() @ b.t()) for m, (a, b) in zip(masks, factors, strict=True)]
    theirs = torch.autograd.grad(sum((y**2).sum() for y in wanted), leaves)
    for actual, reference in zip((*outputs, *ours), (*wanted, *theirs), strict=True):
        close(actual, reference, 1e-5)


def test_recompute_repeats_dropout_and_evaluation_has_none() -> None:
    lora = LoraLinear(nn.Linear(I, O), R, 1.0, dropout=0.5)
    lora.initialize(0, "x")
    with torch.no_grad():
        lora.lora_b.copy_(draw(O, R, seed=2))
    x = draw(N, I, seed=1).requires_grad_()

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(3)
        inner: Any = checkpoint(lora, x, use_reentrant=False) if recompute else lora(x)
        return list(torch.autograd.grad((inner**2).sum(), (x, lora.lora_a, lora.lora_b)))

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)
    assert not torch.equal(lora(x), lora(x))
    lora.eval()
    assert torch.equal(lora(x), lora(x))


def test_nothing_wide_is_saved_for_backward() -> None:
    """Autograd saves x and x A^T, not the weight, the output or a mask."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        lora = LoraLinear(bases()["nf4"], R, 1.0, dropout=0.1)
        lora(draw(N, I, seed=1).requires_grad_())
    assert sum(sizes) <= N * I + N * R + R * (I + O)
