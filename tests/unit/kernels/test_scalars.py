"""Scalar functions: rounding against torch for all bfloat16, float16 against numpy, the exponential in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from ingle.kernels.numba.scalars import (
    bits,
    exp,
    from_half,
    largest,
    load,
    narrow,
    store,
    supported,
    to_half,
    widen,
)


@njit
def _widen_all(source, out):
    for i in range(len(source)):
        out[i] = widen(source[i])


@njit
def _narrow_all(source, out):
    for i in range(len(source)):
        out[i] = narrow(source[i])


@njit
def _exp_all(source, out):
    for i in range(len(source)):
        out[i] = exp(source[i])


@njit
def _from_half_all(source, out):
    for i in range(len(source)):
        out[i] = from_half(source[i])


@njit
def _to_half_all(source, out):
    for i in range(len(source)):
        out[i] = to_half(source[i])


@njit
def _copy(source, out):
    for i in range(len(source)):
        store(out, i, load(source, i))


def test_widening_is_exact_for_every_bfloat16() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    out = np.empty(1 << 16, np.float32)
    _widen_all(bits(every), out)
    np.testing.assert_array_equal(out, every.float().numpy())


def test_narrowing_rounds_as_torch_does() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)  # ties and their neighbours
    values = (every.view(torch.int32)[:, None] + steps).flatten().view(torch.float32)
    values = torch.cat([values, torch.randn(10_000, generator=generator)])
    out = np.empty(len(values), np.uint16)
    _narrow_all(values.numpy(), out)
    ours, theirs = torch.from_numpy(out).view(torch.bfloat16), values.bfloat16()
    assert torch.equal(ours.isnan(), theirs.isnan())
    finite = ~theirs.isnan()
    assert torch.equal(ours[finite].view(torch.int16), theirs[finite].view(torch.int16))


def test_float16_converts_as_in_numpy() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(len(every), np.float32)
    _from_half_all(every, wide)
    np.testing.assert_array_equal(wide, every.view(np.float16).astype(np.float32))
    near = (wide.view(np.uint32)[:, None] + np.array([0, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32)).view(np.float32)
    values = np.concatenate([near.ravel(), np.float32([1e-9, 6e4, 65519, 65520, 1e9, np.inf, -np.inf])])
    values = values[~np.isnan(values)]
    out = np.empty(len(values), np.uint16)
    _to_half_all(values, out)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, values.astype(np.float16).view(np.uint16))


def test_the_exponential_is_within_two_ulp() -> None:
    x = np.linspace(-87, 88, 1_000_001, dtype=np.float32)
    out = np.empty_like(x)
    _exp_all(x, out)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(out / exact - 1).max() < 2 * 2**-23
    edges = np.array([-1e30, -np.inf, 0.0, np.nan], np.float32)
    out = np.empty_like(edges)
    _exp_all(edges, out)
    assert out[0] < 2e-38 and out[1] < 2e-38 and out[2] == 1 and np.isnan(out[3])


def test_largest_orders_floats_and_keeps_nan() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert largest(values) == values.max()
    assert largest(-np.abs(values)) == -np.abs(values).min()
    assert largest(np.array([-np.inf, -0.0, -5], np.float32)) == 0
    assert np.isnan(largest(np.array([1, np.nan, np.inf], np.float32)))
    half = torch.tensor([-3.0, -2.0, -7.5]).bfloat16()
    assert largest(bits(half)) == -2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_and_store_take_both_dtypes(dtype: torch.dtype) -> None:
    source = torch.randn(100).to(dtype)
    out = torch.empty_like(source)
    _copy(bits(source), bits(out))
    assert torch.equal(source, out)


def test_supported_needs_one_float_dtype_on_the_cpu() -> None:
    half, single = torch.ones(2).bfloat16(), torch.ones(2)
    assert supported(half, half) and supported(single)
    assert not supported(half, single) and not supported(torch.ones(2).double()) and not supported(torch.ones(2).half())
    assert not supported(torch.ones(2, device="meta"))
