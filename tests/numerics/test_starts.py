"""Initial values of A and B that the base is decomposed for, and DoRA: against PEFT, and through its files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from ingle import adapters
from ingle.adapters.initialization import olora, pissa
from ingle.adapters.lora import LoraLinear, generator_of
from ingle.adapters.merging import is_changed, merged_planes, merged_weight
from ingle.config.adapter import DoraAdapter, LoraAdapter, WeightAdapter
from ingle.config.base import base_section
from ingle.errors import AdapterError
from ingle.quant import convert
from tests.numerics.test_peft import gpt2, llama, logits, move, through_peft

# PEFT uses a deprecated name of transformers and warns of tied weights.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SECTIONS = {
    "gaussian": LoraAdapter(rank=4, init="gaussian"),
    "orthogonal": LoraAdapter(rank=4, init="orthogonal"),
    "pissa": LoraAdapter(rank=4, init="pissa", rslora=True, rank_pattern={"q_proj": 2}),
    "olora": LoraAdapter(rank=4, init="olora", freeze_a=True),
    "dora": DoraAdapter(kind="dora", rank=4, rslora=True, rank_pattern={"layers.1.mlp.*": 6}),
    "dora, pissa": DoraAdapter(kind="dora", rank=4, init="pissa"),
    "frozen A": LoraAdapter(rank=4, freeze_a=True),
}


def attached(model: nn.Module, section: WeightAdapter, **options: Any) -> nn.Module:
    selection = adapters.insert(model, section)
    adapters.initialize(model, section, selection, seed=0, **options)
    return model.eval()


def close(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


def layer_of(section: WeightAdapter, weight: Tensor, bias: Tensor | None = None) -> LoraLinear:
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    model = attached(nn.ModuleDict({"a": linear, "b": nn.Linear(2, 2)}), section)
    layer = model.get_submodule("a")
    assert isinstance(layer, LoraLinear)
    return layer


@pytest.mark.parametrize("format", ["none", "nf4"])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_start_is_the_base(section: WeightAdapter, format: str) -> None:
    base = llama()
    if format != "none":
        convert(base, base_section(format))
    before, identity = logits(base), adapters.identify(base).tensors
    model = attached(base, section)
    close(logits(model), before, 1e-6)
    with adapters.use(model, "initial"):
        assert torch.equal(logits(model), before)
    assert adapters.identify(model).tensors == identity, "the bytes of the base stay"
    move(model)
    adapters.update_norms(model)
    assert (logits(model) - before).abs().max() > 1e-2
    with adapters.use(model, "initial"):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_peft_reads_what_was_trained_and_training_continues(section: WeightAdapter, tmp_path: Path) -> None:
    model = attached(llama(), section)
    move(model)
    adapters.update_norms(model)
    adapters.save_adapter(model, tmp_path, section, "tiny")
    wanted = logits(model)
    close(through_peft(llama(), tmp_path), wanted)
    loaded = llama()
    adapters.load_adapter(loaded, tmp_path)
    close(logits(loaded), wanted)
    read = adapters.adapter_config(tmp_path)
    assert isinstance(read, WeightAdapter) and read.init == section.init and read.freeze_a == section.freeze_a
    continued = attached(llama(), read.model_copy(update={"path": str(tmp_path)}), keeps_initial=True)
    close(logits(continued), wanted)
    trained, expected = (dict(adapters.trainable_parameters(each)) for each in (continued, model))
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in trained)
    start = logits(continued)
    move(continued, seed=2)
    adapters.update_norms(continued)
    with adapters.use(continued, "initial"):
        assert torch.equal(logits(continued), start)
    assert not torch.equal(logits(continued), start)


def test_plain_lora_is_saved_as_before(tmp_path: Path) -> None:
    """Settings that are not used leave no trace in the files."""
    section = LoraAdapter(rank=4)
    adapters.save_adapter(attached(llama(), section), tmp_path, section, "tiny")
    text = (tmp_path / "adapter_config.json").read_text() + str(adapters.read_record(tmp_path).to_json())
    assert "dora" not in text and 'init"' not in text.replace("init_lora_weights", "") and "freeze" not in text


@pytest.mark.parametrize(("init", "make"), [("pissa", llama), ("pissa", gpt2), ("olora", llama)])
def test_the_start_is_that_of_peft(init: Any, make: Any) -> None:
    """Singular vectors and QR have free signs, so the products are compared. PEFT's olora mixes up GPT-2's sides."""
    model = attached(make(), LoraAdapter(rank=4, alpha=6, init=init))
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=init, target_modules="all-linear", fan_in_fan_out=make is gpt2
    )
    theirs = peft.get_peft_model(make(), config).base_model.model
    for name, layer in adapters.lora_modules(model).items():
        other: Any = theirs.get_submodule(name)
        wanted = other.lora_B["default"].weight @ other.lora_A["default"].weight
        close(layer.lora_b @ layer.lora_a, wanted, 1e-4)


def test_subspace_iteration_finds_the_principal_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 80, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(weight, full_matrices=False)
    weight = u @ torch.diag(0.8 ** torch.arange(80.0)) @ v
    exact = pissa(weight, 4, 0.5, generator_of(0, "x"))
    monkeypatch.setattr("ingle.adapters.initialization.EXACT_SVD_WEIGHTS", 0)
    found = pissa(weight, 4, 0.5, generator_of(0, "x"))
    close(found[1] @ found[0], exact[1] @ exact[0], 1e-3)
    best = (u[:, :4] * 0.8 ** torch.arange(4.0)) @ v[:4]
    close(0.5 * exact[1] @ exact[0], best, 1e-5)


def test_olora_is_the_start_of_the_complete_decomposition() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, r = torch.linalg.qr(weight)
    a, b = olora(weight, 3)
    close(b @ a, q[:, :3] @ r[:3], 1e-12)


def test_a_rank_beyond_the_weight_is_refused() -> None:
    with pytest.raises(AdapterError, match="fewer than the rank 40"):
        attached(llama(), LoraAdapter(rank=40, init="pissa", target_modules=("q_proj",)))
    with pytest.raises(AdapterError, match="matches no adapted layer"):
        attached(llama(), LoraAdapter(rank=4, rank_pattern={"q_porj": 2}))


@pytest.mark.parametrize("with_bias", [False, True])
def test_dora_computes_what_peft_computes(with_bias: bool) -> None:
    """Outputs and every gradient, with the norm of PEFT's own module."""
    torch.manual_seed(0)
    weight, bias = torch.randn(12, 20), torch.randn(12) if with_bias else None
    ours = layer_of(DoraAdapter(kind="dora", rank=3, alpha=5, target_modules=("a",)), weight, bias)
    move(ours)
    base = copy.deepcopy(ours.base)
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["a"])
    wrapped: Any = peft.get_peft_model(nn.ModuleDict({"a": base}), config).base_model.model["a"]
    with torch.no_grad():
        wrapped.lora_A["default"].weight.copy_(ours.lora_a)
        wrapped.lora_B["default"].weight.copy_(ours.lora_b)
        wrapped.lora_magnitude_vector["default"].weight.copy_(ours.magnitude)
    adapters.update_norms(ours)
    x = torch.randn(2, 7, 20, requires_grad=True)
    y, wanted = ours(x), wrapped(x)
    grad = torch.randn(y.shape)
    found = torch.autograd.grad(y, (x, ours.lora_a, ours.lora_b, ours.magnitude), grad)  # type: ignore[arg-type]
    theirs = (x, *(getattr(wrapped, key)["default"].weight for key in ("lora_A", "lora_B", "lora_magnitude_vector")))
    for actual, other in zip((y, *found), (wanted, *torch.autograd.grad(wanted, theirs, grad)), strict=True):
        close(actual, other, 3e-6)
    close(nn.functional.linear(x, merged_weight(ours, torch.float32), bias), wanted, 3e-6)


def test_norms_survive_cancellation() -> None:
    """A change that removes almost all of a row."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    layer = layer_of(DoraAdapter(kind="dora", rank=2, alpha=2, target_modules=("a",)), weight)
    with torch.no_grad():
        layer.lora_a.copy_(weight[:2])
        layer.lora_b.zero_()
        layer.lora_b[0, 0] = -1 + 1e-4
        layer.lora_b[3, 1] = 2.0
    adapters.update_norms(layer)
    exact = (weight.double() + layer.lora_b.double() @ layer.lora_a.double()).norm(dim=1)
    assert ((layer.norm - exact) / exact).abs().max() < 1e-3
    assert (layer.norm[1:] - exact[1:]).abs().max() < 1e-5


def test_a_frozen_a_gives_the_other_gradients_and_keeps_no_inputs() -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    kept, gradients = [], []
    for freeze in (False, True):
        layer = layer_of(LoraAdapter(rank=3, freeze_a=freeze, target_modules=("a",)), weight)
        with torch.no_grad():
            layer.lora_b.fill_(0.1)
        x = torch.ones(5, 20, requires_grad=True)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        gradients.append(torch.autograd.grad(y.square().sum(), (x, layer.lora_b)))
        kept.append(max(sizes))
    assert kept == [5 * 20, 5 * 3]
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_an_untrained_start_keeps_the_bytes_of_a_format() -> None:
    model = llama()
    convert(model, base_section("q4_1"))
    attached(model, LoraAdapter(rank=4, init="pissa"))
    for layer in adapters.lora_modules(model).values():
        assert not is_changed(layer)
        assert all(plane is layer.base.planes()[key] for key, plane in merged_planes(layer).items())
    move(model)
    assert all(is_changed(layer) for layer in adapters.lora_modules(model).values())
