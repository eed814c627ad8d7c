"""Attention with added keys against plain attention over each document with these keys in front of its own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ingle.kernels.attention import flex
from ingle.kernels.attention.packed import packed_attention
from ingle.kernels.attention.prefix import add_keys
from ingle.kernels.attention.tree_attention import tree_attention
from ingle.kernels.attention.trees import Trees

LENGTHS, NUM_KEYS = (40, 1, 150, 9), 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window-cap-sinks": {"window": 12, "softcap": 2.0, "sinks": True},
    "encoder": {"causal": False},
}


def make(dtype: torch.dtype, sinks: bool) -> tuple[list[Tensor], Tensor]:
    """q [1, 4, N, 16]; k, v [1, 2, N, 16]; keys and values [2, P, 16]; sinks [4]; and the gradient of the result."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, sum(LENGTHS), 16) for heads in (4, 2, 2)] + [(2, NUM_KEYS, 16)] * 2 + [(4,)] * sinks
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn(1, sum(LENGTHS), 4, 16, generator=generator).to(dtype)


def attend_alone(leaves: list[Tensor], index: Tensor, *, causal: bool = True, **options: Any) -> Tensor:
    """One document, [T, Hq, Dh]: position P + t sees the added keys at positions 0 to P - 1, and its own."""
    q, k, v, keys, values, *sinks = leaves
    k, v = (torch.cat((more, own[0, :, index]), 1).repeat_interleave(2, 0) for more, own in ((keys, k), (values, v)))
    scores = q[0, :, index] @ k.mT * 0.3
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    key, query = torch.arange(k.shape[1]), NUM_KEYS + torch.arange(len(index))[:, None]
    hidden = (key > query) & causal
    hidden |= query - key >= options.get("window", len(key))
    scores = scores.masked_fill(hidden, -torch.inf)
    scores = torch.cat((scores, *(s[:, None, None].expand(-1, len(index), 1) for s in sinks)), -1)
    return (scores.softmax(-1)[..., : k.shape[1]] @ v).transpose(0, 1)


def attend(leaves: list[Tensor], positions: Tensor, compute: Any, **options: Any) -> Tensor:
    q, k, v, keys, values, *sinks = leaves
    out, lse = compute(q, k, v, scale=0.3, **options, sinks=sinks[0] if sinks else None, returns_lse=True)
    hidden = positions[:, None] + NUM_KEYS - torch.arange(NUM_KEYS) >= options.get("window", 1000)
    return add_keys(out, lse, q, keys, values, scale=0.3, softcap=options.get("softcap"), hidden=hidden)


def require_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor], exact: list[Tensor], grad: Tensor) -> None:
    found = (ours, *torch.autograd.grad(ours, leaves, grad))
    wanted = (theirs, *torch.autograd.grad(theirs, exact, grad.double()))
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == grad.dtype
        assert (actual.double() - expected).norm() <= TOLERANCE[grad.dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_documents(dtype: torch.dtype, case: str) -> None:
    options = dict(CASES[case])
    leaves, grad = make(dtype, bool(options.pop("sinks", False)))
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    places = torch.arange(sum(LENGTHS)).split(LENGTHS)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ours = attend(leaves, positions, lambda q, k, v, **more: packed_attention(q, k, v, bounds.int(), **more), **options)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = torch.cat([attend_alone(exact, index, **options) for index in places])[None]
    require_same(ours, theirs, leaves, exact, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_trees(dtype: torch.dtype) -> None:
    """The second and the third document continue the first; added keys come before the prompt."""
    leaves, grad = make(dtype, sinks=False)
    bounds = [0, *itertools.accumulate(LENGTHS)]
    trees = Trees.of(bounds, [-1, 0, 0, -1])
    assert trees is not None
    positions = torch.cat([torch.arange(n) + start for n, start in zip(LENGTHS, trees.starts, strict=True)])
    ours = attend(leaves, positions, lambda q, k, v, **more: tree_attention(q, k, v, trees, **more), window=60)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    own = torch.arange(sum(LENGTHS)).split(LENGTHS)
    parts = [attend_alone(exact, own[0], window=60)]
    parts += [attend_alone(exact, torch.cat((own[0], own[d])), window=60)[LENGTHS[0] :] for d in (1, 2)]
    parts.append(attend_alone(exact, own[3], window=60))
    require_same(ours, torch.cat(parts)[None], leaves, exact, grad)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_log_sum_exp_of_flex() -> None:
    q, k, v = (leaf.detach() for leaf in make(torch.float32, sinks=False)[0][:3])
    sinks = torch.linspace(-1, 2, 4)
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    options: dict[str, Any] = {"scale": 0.3, "causal": True, "window": None, "softcap": None, "sinks": sinks}
    flexible = flex.attend_flex(q, k, v, bounds, **options, returns_lse=True)
    for ours, theirs in zip(flexible, packed_attention(q, k, v, bounds, **options, returns_lse=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
