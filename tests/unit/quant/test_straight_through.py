"""Tests linear maps that train through their rounding: outputs, gradients and what is saved."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ingle.adapters import attach
from ingle.config.adapter import NoAdapter
from ingle.config.base import TernaryBase, TernaryGroups
from ingle.errors import QuantizationError
from ingle.quant import TernaryLinear, convert, settle
from ingle.quant.ggml.superblocks import TQ1_0, TQ2_0
from ingle.quant.ternary import Ternary
from tests.tiny import take_steps

GROUPS: list[TernaryGroups] = ["tensor", "row", 256]


def make(group_size: TernaryGroups = "tensor", dtype: torch.dtype = torch.float32, seed: int = 0) -> TernaryLinear:
    torch.manual_seed(seed)
    return TernaryLinear(Ternary(group_size), nn.Linear(512, 48, dtype=dtype))


def decoded(layer: TernaryLinear, dtype: torch.dtype) -> Tensor:
    planes = layer.format.encode(layer.weight)
    return layer.format.decode(planes, layer.out_features, layer.in_features, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
def test_it_answers_with_the_ternary_weight_and_its_gradient_goes_straight_through(
    group_size: TernaryGroups, dtype: torch.dtype
) -> None:
    layer = make(group_size, dtype)
    plain = nn.Linear(512, 48, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(decoded(layer, dtype))
        plain.bias.copy_(layer.bias)
    scales = plain.weight.abs().unique()
    assert len(scales) - 1 == {"tensor": 1, "row": len(layer.weight.bfloat16().abs().mean(1).unique())}.get(
        str(group_size), len(scales) - 1
    )
    x = torch.randn(2, 7, 512, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), plain(theirs)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, **tolerance)


def test_the_scale_is_the_mean_size_and_half_of_it_divides_codes() -> None:
    layer = make()
    mean = layer.weight.abs().double().mean()
    values = decoded(layer, torch.float32)
    scale = values.abs().max()
    assert abs(scale / mean - 1) < 2**-8  # rounded to what bfloat16 holds
    expected = (layer.weight / scale).round().clamp(-1, 1)
    assert torch.equal(values, expected * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
def test_settled_weights_answer_the_same_and_stay(group_size: TernaryGroups, dtype: torch.dtype) -> None:
    layer = make(group_size, dtype)
    x = torch.randn(3, 512, dtype=dtype)
    before = layer(x)
    exact = decoded(layer, torch.float32)
    settle(nn.Sequential(layer))
    assert torch.equal(layer.weight.float(), exact)  # no dtype rounds them
    assert torch.equal(layer(x), before)
    assert torch.equal(functional.linear(x, layer.weight, layer.bias), before)
    kept = layer.weight.clone()
    layer.settle()
    assert torch.equal(layer.weight, kept)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("group_size", GROUPS)
def test_gguf_holds_the_very_same_weights(kind: str, group_size: TernaryGroups) -> None:
    layer = make(group_size, torch.bfloat16)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[4, :300] = 0
    used = decoded(layer, torch.float32)
    settle(layer)
    format = {"TQ1_0": TQ1_0(), "TQ2_0": TQ2_0()}[kind]
    planes = format.encode(layer.weight)
    assert torch.equal(format.decode(planes, 48, 512, torch.float32), used)
    number = gguf.GGMLQuantizationType[kind]
    theirs = gguf.quants.quantize(layer.weight.detach().float().numpy(), number)
    assert np.array_equal(gguf.quants.dequantize(theirs, number), used.numpy())


def test_weights_that_are_ternary_already_keep_their_size() -> None:
    signs = torch.randint(-1, 2, (16, 256), generator=torch.Generator().manual_seed(0)).float()
    weight = signs * 0.0371  # no number of bfloat16's
    format = Ternary()
    values = format.decode(format.encode(weight), 16, 256, torch.float32)
    assert torch.equal(values, signs * torch.tensor(0.0371).half().float())


def test_forward_keeps_two_bits_a_weight_for_backward() -> None:
    layer = make(dtype=torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 512, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sum(tensor.nbytes for tensor in saved) == x.nbytes + 48 * 512 // 4 + 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))


def test_training_lowers_the_loss_and_flips_codes() -> None:
    model = make_model()
    convert(model, TernaryBase(format="ternary", train=True))
    attach(model, NoAdapter(kind="none"), seed=0)
    assert [type(module) for module in model] == [TernaryLinear, nn.GELU, TernaryLinear]
    x, target = torch.randn(64, 64), torch.randn(64, 32)
    before = decoded(model[0], torch.float32).sign()
    losses = take_steps(model, x, target, lr=0.01, num_steps=20)
    assert losses[-1] < 0.7 * losses[0]
    assert (decoded(model[0], torch.float32).sign() != before).any()


def test_conversion_takes_weights_over_and_works_before_there_are_any() -> None:
    model = make_model()
    weights = [model[0].weight, model[2].weight]
    convert(model, TernaryBase(format="ternary", train=True))
    assert model[0].weight is weights[0]
    assert model[2].weight is weights[1]
    assert model[0].format is model[2].format
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    convert(empty, TernaryBase(format="ternary", train=True))
    assert isinstance(empty[0], TernaryLinear)
    assert empty[0].weight.is_meta


def test_what_cannot_be_trained_so_is_refused() -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(QuantizationError, match="cannot be trained with ternary weights") as caught:
        convert(nn.Sequential(Conv1D(8, 8)), TernaryBase(format="ternary", train=True))
    assert "--base.train=false" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_a_compiled_model_answers_the_same() -> None:
    torch.compiler.reset()
    model = make_model()
    convert(model, TernaryBase(format="ternary", train=True))
    x = torch.randn(4, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (grad,) = torch.autograd.grad(torch.compile(model, backend="aot_eager")(x).square().sum(), x)
    assert torch.equal(grad, expected)
