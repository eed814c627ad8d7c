"""RMSNorm and SwiGLU, forward and backward, against autograd through the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ingle.kernels.layers import elementwise
from ingle.kernels.layers.elementwise import recompute_rms_norm, rms_norm, rms_norm_backward_, swiglu, swiglu_backward_

N, H = 37, 50
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=["numba", "torch"], autouse=True)
def path(request: Any, monkeypatch: Any) -> None:
    """The numba kernels, and the torch code for other devices and dtypes."""
    if request.param == "torch":
        monkeypatch.setattr(elementwise, "supported", lambda *tensors: False)


def close(actual: Tensor, wanted: Tensor) -> None:
    assert (actual.double() - wanted).norm() <= TOLERANCE[actual.dtype] * wanted.norm()


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, with_residual: bool) -> None:
    h, weight, grad = draw(N, H, seed=1, dtype=dtype), draw(H, seed=2, dtype=dtype), draw(N, H, seed=3, dtype=dtype)
    residual = draw(N, H, seed=4, dtype=dtype) if with_residual else None
    x, rstd = rms_norm(h, weight, 1e-5)
    exact = h.double().requires_grad_()
    wanted = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    close(x, wanted)
    assert rstd.dtype == torch.float32
    assert torch.equal(recompute_rms_norm(h, weight, rstd), x)
    (grad_h,) = torch.autograd.grad(wanted, exact, grad.double())
    buffer = grad.clone()
    result = rms_norm_backward_(buffer, h, weight, rstd, residual)
    assert result is buffer
    close(result, grad_h if residual is None else grad_h + residual.double())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up, grad = (draw(N, H, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    gate *= 5
    exact = [gate.double().requires_grad_(), up.double().requires_grad_()]
    wanted = torch.nn.functional.silu(exact[0]) * exact[1]
    close(swiglu(gate, up), wanted)
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    out, to_gate, to_up = grad.clone(), gate.clone(), up.clone()
    swiglu_backward_(out, to_gate, to_up)
    close(out, wanted)
    close(to_gate, gradients[0])
    close(to_up, gradients[1])


def test_large_gates_do_not_overflow() -> None:
    gate = torch.tensor([[-300.0, 300.0, 0.0]])
    up = torch.ones(1, 3)
    assert torch.equal(swiglu(gate, up), torch.tensor([[0.0, 300.0, 0.0]])) or torch.allclose(
        swiglu(gate, up), torch.tensor([[0.0, 300.0, 0.0]]), atol=1e-30
    )
