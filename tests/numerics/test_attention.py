"""``packed_attention`` against plain attention in float64, one document at a time: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ingle.kernels.attention import packed_attention

LENGTHS = {
    "one": [37],
    "equal": [16, 16, 16],
    "mixed": [1, 5, 33, 1, 8, 70, 2],
    "ones": [1] * 20,
    "tiny": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 4,
    "long": [300, 3],
}
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, causal: bool, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outputs = []
    for part in torch.arange(sum(lengths)).split(lengths):
        scores = (q[0, :, part] @ k[0, :, part].transpose(-1, -2)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = part[:, None] - part[None, :]
        hidden = distance.abs() >= (window or 10**9)
        if causal:
            hidden |= distance < 0
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[0, :, part])
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def compare(
    dtype: torch.dtype, lengths: list[int], *, hq: int = 4, hkv: int = 2, dh: int = 16, causal: bool = True,
    window: int | None = None, softcap: float | None = None, scale: float = 0.3,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    n = sum(lengths)
    # As projections make them: [1, N, H, Dh] seen as [1, H, N, Dh].
    q, k, v = (
        torch.randn(1, n, h, dh, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for h in (hq, hkv, hkv)
    )
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    out = packed_attention(q, k, v, cu_seqlens, scale=scale, causal=causal, window=window, softcap=softcap)
    assert out.shape == (1, n, hq, dh) and out.dtype == dtype
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = reference(*exact, lengths, scale, causal, window, softcap)
    theirs = torch.autograd.grad(expected, exact, grad.double())
    for actual, wanted in zip((out, *ours), (expected, *theirs), strict=True):
        # A query with one key has no gradient at all: rounding is then measured against the output.
        assert (actual.double() - wanted).norm() <= DTYPES[dtype] * max(wanted.norm(), expected.norm() / 4)
        assert (actual.double() - wanted).abs().max() <= 6 * DTYPES[dtype] * max(wanted.abs().max(), 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_causal_with_grouped_heads(dtype: torch.dtype, lengths: list[int]) -> None:
    compare(dtype, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window, softcap", [(None, None), (4, None), (None, 2.0), (7, 2.0), (1, None)])
def test_windows_caps_and_both_directions(
    dtype: torch.dtype, causal: bool, window: int | None, softcap: float | None
) -> None:
    compare(dtype, LENGTHS["mixed"], causal=causal, window=window, softcap=softcap)


@pytest.mark.parametrize("hq, hkv, dh", [(1, 1, 8), (6, 6, 20), (8, 1, 64), (9, 3, 80)])
def test_head_layouts(hq: int, hkv: int, dh: int) -> None:
    compare(torch.bfloat16, LENGTHS["mixed"], hq=hq, hkv=hkv, dh=dh, scale=dh**-0.5)


def test_a_nan_stays_in_its_document() -> None:
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    k[0, :, 7], v[0, :, 8] = float("nan"), float("inf")
    out = packed_attention(q, k, v, torch.tensor([0, 5, 9, 12], dtype=torch.int32), scale=1.0)
    assert out[:, :5].isfinite().all() and out[:, 9:].isfinite().all()
    assert not out[:, 7:9].isfinite().any()
