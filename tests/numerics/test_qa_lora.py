"""LoRA over groups of inputs, and through the rounding of its merge: outputs and gradients against float64 autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ingle import adapters
from ingle.adapters import LoraLinear, merged_planes, merged_weight
from ingle.adapters.lora import Merged
from ingle.config.adapter import LoraAdapter, MergeAware, QaLoraAdapter
from ingle.config.base import base_section
from ingle.kernels.layers.lora import Projection, lora_linears, pool, spread
from ingle.quant import QuantLinear, convert, make_format
from tests.numerics.test_fusion import CONFIGS, compare, make, run
from tests.numerics.test_lora import TOLERANCE, close, draw

I, O, R, N = 96, 48, 4, 30  # noqa: E741
FOLDING = {"q4_1": base_section("q4_1"), "q5_1": base_section("q5_1")} | {
    f"hqq-{bits}-{size}": base_section({"format": "hqq", "bits": bits, "group_size": size})
    for bits, size in ((4, 32), (2, 64))  # rows of 96: the last group of 64 is short
}


def expand(a: Tensor, group_size: int, in_features: int = I) -> Tensor:
    """A with a column for each input: plain LoRA."""
    return a.repeat_interleave(group_size, 1)[:, :in_features]


def quantized_layer(name: str, *, seed: int = 0, scale: float = 0.5) -> tuple[QuantLinear, LoraLinear]:
    format = make_format(FOLDING[name])
    assert format is not None
    base = QuantLinear(format, I, O)
    base.quantize(draw(O, I, seed=seed) * 0.02)
    assert format.additive_field is not None
    lora = LoraLinear(base, R, scale, group_size=format.additive_field)
    with torch.no_grad():
        lora.lora_a.copy_(draw(*lora.lora_a.shape, seed=1) * 0.1)
        lora.lora_b.copy_(draw(O, R, seed=2) * 0.1)
    return base, lora


@pytest.mark.parametrize("size", [8, 32, 40, 96], ids=str)
def test_pool_and_spread_are_transposes_of_each_other(size: int) -> None:
    x, y = draw(5, I, seed=1, dtype=torch.double), draw(5, -(-I // size), seed=2, dtype=torch.double)
    torch.testing.assert_close((pool(x, size) * y).sum(), (x * spread(y, size, I)).sum())
    for group in range(y.shape[1]):  # an incomplete last group is summed as far as it goes
        torch.testing.assert_close(pool(x, size)[:, group], x[:, group * size : (group + 1) * size].sum(1))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [(32, 32), (40, 40), (32, 16), (1, 32)], ids=str)
@pytest.mark.parametrize("holds_change", [(False, False), (True, True), (False, True)], ids=str)
def test_outputs_and_gradients(dtype: torch.dtype, sizes: tuple[int, int], holds_change: tuple[bool, bool]) -> None:
    """Two projections of one input; where the weight holds the change, gradients go straight through its rounding."""
    x = draw(N, I, seed=1, dtype=dtype).requires_grad_()
    master = torch.promote_types(dtype, torch.float32)
    weights = [draw(O, I, seed=2 + i, dtype=dtype) for i in range(2)]
    factors = [
        (
            draw(R + i, -(-I // size), seed=4 + i, dtype=master).requires_grad_(),
            draw(O, R + i, seed=6 + i, dtype=master).requires_grad_(),
        )
        for i, size in enumerate(sizes)
    ]
    projections = [
        Projection(lambda dtype, w=w: w, None, a, b, 0.3, group_size=size, holds_change=holds)
        for w, (a, b), size, holds in zip(weights, factors, sizes, holds_change, strict=True)
    ]
    outputs = lora_linears(x, projections)
    upstream = [draw(*y.shape, seed=10 + i, dtype=dtype) for i, y in enumerate(outputs)]
    leaves = [x, *(f for pair in factors for f in pair)]
    ours = torch.autograd.grad(outputs, leaves, upstream)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = []
    for i, (w, size, holds) in enumerate(zip(weights, sizes, holds_change, strict=True)):
        delta = 0.3 * exact[2 + 2 * i] @ expand(exact[1 + 2 * i], size)
        # Straight through: the value is that of w, the gradient that of w + delta.
        weight = w.double() + delta - delta.detach() if holds else w.double() + delta
        wanted.append(exact[0] @ weight.t())
    theirs = torch.autograd.grad(wanted, exact, [g.double() for g in upstream])
    for actual, reference in zip((*outputs, *ours), (*wanted, *theirs), strict=True):
        close(actual, reference, TOLERANCE[dtype])


def test_dropout_applies_to_the_sums() -> None:
    """As in the authors' code: pooled first, dropped then; gradients are those of that mask."""
    x, zero = draw(N, I, seed=1).requires_grad_(), torch.zeros(I // 32, I)
    eye = torch.eye(I // 32)
    torch.manual_seed(7)
    dropped = lora_linears(x, [Projection(lambda dtype: zero, None, eye, eye, 1.0, 0.4, group_size=32)])[0]
    mask = (dropped.detach() != 0).float() / 0.6
    close(dropped, pool(x, 32) * mask, 1e-6)
    weight = draw(O, I, seed=2)
    a, b = draw(R, I // 32, seed=3).requires_grad_(), draw(O, R, seed=4).requires_grad_()
    torch.manual_seed(7)
    y = lora_linears(x, [Projection(lambda dtype: weight, None, a, b, 0.5, 0.4, group_size=32)])[0]
    wanted = x @ weight.t() + 0.5 * ((pool(x, 32) * mask) @ a.t() @ b.t())
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), (x, a, b)),
        torch.autograd.grad(wanted.square().sum(), (x, a, b)),
        strict=True,
    ):
        close(ours, theirs, 1e-5)


def test_the_sums_are_kept_and_not_the_input() -> None:
    sizes: list[int] = []
    _, lora = quantized_layer("q5_1")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        lora(draw(N, I, seed=3).requires_grad_())
    assert sum(sizes) <= N * I // 32 + N * R + R * I // 32 + O * R


@pytest.mark.parametrize("name", FOLDING)
def test_merged_equals_unmerged_up_to_the_rounding_of_the_field(name: str) -> None:
    """Codes and scales stay, and what a weight is off by is half a step of the float16 field."""
    base, lora = quantized_layer(name)
    planes = merged_planes(lora)
    exact = merged_weight(lora, torch.float32).double()
    assert (exact - base.decode(torch.float32)).abs().max() > 0.01
    decoded = base.format.decode(planes, O, I, torch.float32).double()
    if name.startswith("hqq"):
        zero, scale = (lora.spread(planes[key].view(torch.float16).double()) for key in ("zero", "scale"))
        bound = scale.abs() * zero.abs() * 2**-11 * 1.01
        assert all(torch.equal(planes[key], base.planes()[key]) for key in planes if key != "zero")
    else:
        blocks = planes["data"].unflatten(1, (I // 32, -1))
        field = blocks[..., 2:4].contiguous().view(torch.float16).double()[..., 0].repeat_interleave(32, 1)
        bound = field.abs() * 2**-11 * 1.01 + exact.abs() * 2**-23
        same = blocks == base.planes()["data"].unflatten(1, (I // 32, -1))
        assert bool(same[..., :2].all()) and bool(same[..., 4:].all())
    assert bool(((decoded - exact).abs() <= bound + 1e-9).all())
    x = draw(N, I, seed=3)
    y = lora(x)
    error = (x.double() @ decoded.t() - y.double()).abs()
    assert bool((error <= x.double().abs() @ bound.t() + 1e-5).all())


@pytest.mark.parametrize("name", FOLDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_the_rounding_the_merged_weight_is_the_one_that_was_used(name: str, dtype: torch.dtype) -> None:
    base, lora = quantized_layer(name)
    planes = merged_planes(lora)
    lora.merged = Merged(base.format, planes)
    served = base.format.decode(planes, O, I, dtype)
    assert torch.equal(lora.projection().weight(dtype), served)
    x = draw(N, I, seed=3).to(dtype)
    with torch.no_grad():
        assert torch.equal(lora(x), nn.functional.linear(x, served))
    x.requires_grad_()
    y = lora(x)
    assert torch.equal(y, nn.functional.linear(x, served))
    upstream = draw(*y.shape, seed=4, dtype=dtype)
    ours = torch.autograd.grad(y, (x, lora.lora_a, lora.lora_b), upstream)
    g, a, b = upstream.double(), lora.lora_a.double(), lora.lora_b.double()
    grad_delta = g.t() @ x.double()
    close(ours[0], g @ served.double(), TOLERANCE[dtype])
    close(ours[1], 0.5 * pool(b.t() @ grad_delta, lora.group_size), TOLERANCE[dtype])
    close(ours[2], 0.5 * grad_delta @ lora.spread(a).t(), TOLERANCE[dtype])
    with torch.no_grad():
        lora.is_on = False
        assert torch.equal(lora(x), nn.functional.linear(x, base.decode(dtype)))


def rounded(adapter: Any, base: str, dtype: torch.dtype = torch.float32) -> Any:
    model = make(CONFIGS["llama"], dtype, LoraAdapter(rank=3))
    for name, layer in adapters.lora_modules(model).items():
        model.set_submodule(name, layer.base)
    convert(model, base_section(base))
    adapters.attach(model, adapter, seed=0)
    with torch.no_grad():
        for name, parameter in adapters.trainable_parameters(model):
            parameter.copy_(draw(*parameter.shape, seed=len(name)) * 0.1)
    adapters.Rounding(model, adapter, num_steps=4).prepare(4)
    return model.train()


CASES: dict[str, tuple[Any, str]] = {
    "qa_lora": (QaLoraAdapter(kind="qa_lora", rank=3), "q5_1"),
    "qa_lora-rounded": (QaLoraAdapter(kind="qa_lora", rank=3, train_rounding=True), "q4_1"),
    "merge-aware": (LoraAdapter(rank=3, merge_aware=MergeAware()), "q4_0"),
    "merge-aware-other-format": (LoraAdapter(rank=3, merge_aware=MergeAware(format="q8_0")), "nf4"),
    "merge-aware-plain-base": (LoraAdapter(rank=3, merge_aware=MergeAware(format="q4_0")), "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_layers_take_it_too(case: str) -> None:
    adapter, base = CASES[case]
    theirs = run(rounded(adapter, base))
    model = rounded(adapter, base)
    assert adapters.fuse(model).fused == 2
    compare(run(model), theirs, 2e-5)
    bare = rounded(adapter, base)
    with torch.no_grad(), adapters.disabled(bare):
        wanted = run_hidden(bare)
    with torch.no_grad(), adapters.disabled(model):
        torch.testing.assert_close(run_hidden(model), wanted, rtol=1e-5, atol=1e-5)


def run_hidden(model: Any) -> Tensor:
    from ingle.models import forward_hidden
    from tests.numerics.test_fusion import batch

    return forward_hidden(model, batch())
