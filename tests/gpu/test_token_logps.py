"""Log-probabilities and cross-entropy on a CUDA device against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import IGNORE_INDEX
from ingle.kernels.layers.cross_entropy import linear_cross_entropy
from ingle.kernels.layers.token_logps import token_logps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_token_logps_and_loss(dtype: torch.dtype, tolerance: float, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (70, 5001))
    targets = torch.randint(5001, (70,), generator=generator)
    targets[::5] = IGNORE_INDEX
    upstream = torch.randn(70, generator=generator)
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    ours = [t.cuda().requires_grad_() for t in (hidden, weight)]
    options = {"logit_scale": 0.3, "softcap": softcap, "chunk_size": 16}
    expected = token_logps(*exact, targets, **options)
    logps = token_logps(*ours, targets.cuda(), **options)
    pairs = [(logps, expected), (linear_cross_entropy(*ours, targets.cuda(), **options), -expected.sum())]
    gradients = (
        torch.autograd.grad(logps, ours, upstream.cuda()),
        torch.autograd.grad(expected, exact, upstream.double()),
    )
    for actual, wanted in (*pairs, *zip(*gradients, strict=True)):
        assert (actual.cpu().double() - wanted).norm() <= tolerance * wanted.norm()
