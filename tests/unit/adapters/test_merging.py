"""Merged weights, and the steps that train through their rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ingle import adapters
from ingle.adapters import LoraLinear, Rounding, merged_planes, merged_weight, rounding
from ingle.adapters.merging import is_changed
from ingle.config.adapter import LoraAdapter, MergeAware, QaLoraAdapter
from ingle.config.base import BaseConfig, base_section
from ingle.errors import AdapterError, QuantizationError
from ingle.quant import QuantLinear, convert, make_format
from tests.tiny import SIZES

FORMATS = ("nf4", "int8", "q4_0", "q4_1", "q8_0", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")


def layer(base: BaseConfig, *, changed: bool = True, group_size: int = 1) -> LoraLinear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(512, 24, bias=False).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(torch.randn(24, 512, generator=generator) * 0.02)
    convert(box := nn.ModuleDict({"x": linear}), base)
    lora = LoraLinear(box["x"], 4, 2.0, group_size=group_size)
    lora.initialize(0, "x")
    if changed:
        with torch.no_grad():
            lora.lora_b.copy_(torch.randn(24, 4, generator=generator) * 0.02)
    return lora


def equal(ours: Any, theirs: Any) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["none", *FORMATS])
def test_the_merged_weight_is_the_sum_in_float64(name: str) -> None:
    lora = layer(base_section(name))
    base = lora.base.decode(torch.float32) if isinstance(lora.base, QuantLinear) else lora.weight.detach()
    exact = base.double() + 2.0 * lora.lora_b.detach().double() @ lora.lora_a.detach().double()
    assert (merged_weight(lora, torch.float32) - exact).abs().max() <= 1e-7 * exact.abs().max() * 4
    assert torch.equal(merged_weight(lora, torch.bfloat16), merged_weight(lora, torch.float32).bfloat16())
    still = lora.base.decode(torch.float32) if isinstance(lora.base, QuantLinear) else lora.weight.detach()
    assert torch.equal(still, base)


@pytest.mark.parametrize("name", FORMATS)
def test_unchanged_bytes_are_copied_and_others_are_quantized_from_the_sum(name: str) -> None:
    base = base_section(name)
    lora = layer(base, changed=False)
    assert not is_changed(lora)
    assert all(merged_planes(lora)[key] is plane for key, plane in lora.base.planes().items())
    lora = layer(base)
    format = make_format(base)
    assert format is not None
    assert equal(merged_planes(lora), format.encode(merged_weight(lora, torch.float32)))
    other = make_format(base_section("q8_0"))
    assert equal(merged_planes(layer(base, changed=False), other), other.encode(lora.base.decode(torch.float32)))


@pytest.mark.parametrize("name", ["nf4", "q4_k", "q6_k"])
def test_the_same_bytes_with_any_number_of_threads(name: str) -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(merged_planes(layer(base_section(name))))
    finally:
        torch.set_num_threads(threads)
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_a_plain_weight_has_no_format_to_merge_into() -> None:
    with pytest.raises(AdapterError, match="not quantized"):
        merged_planes(layer(base_section("none")))


def test_only_a_change_in_groups_of_the_field_is_folded() -> None:
    """Plain LoRA on q5_1 is quantized again, and its codes change."""
    codes = slice(4, None)
    for size, folds in ((32, True), (1, False)):
        lora = layer(base_section("q5_1"), group_size=size)
        before, after = (planes["data"].unflatten(1, (-1, 24)) for planes in (lora.base.planes(), merged_planes(lora)))
        assert torch.equal(before[..., codes], after[..., codes]) == folds


def test_a_change_that_leaves_float16_is_an_error() -> None:
    lora = layer(base_section("q4_1"), group_size=32)
    with torch.no_grad():
        lora.lora_b.fill_(1e6)
    with pytest.raises(QuantizationError, match="float16 offset"):
        merged_planes(lora)


def llama(base: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 96, "num_hidden_layers": 1}))
    convert(model, base_section(base))
    return model


def attached(base: str, adapter: Any) -> LlamaForCausalLM:
    model = llama(base)
    adapters.attach(model, adapter, seed=0)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter += 0.01
    return model


@pytest.mark.parametrize(
    ("fraction", "num_steps", "first"), [(0.25, 100, 76), (0.25, 10, 8), (1.0, 7, 1), (0.01, 5, 5)]
)
def test_the_last_part_of_the_steps(fraction: float, num_steps: int, first: int) -> None:
    adapter = LoraAdapter(rank=2, merge_aware=MergeAware(fraction=fraction))
    model = attached("q4_0", adapter)
    steps = Rounding(model, adapter, num_steps)
    assert steps.first_step == first
    layers = adapters.lora_modules(model).values()
    steps.prepare(first - 1)
    assert all(layer.merged is None for layer in layers)
    steps.prepare(first)
    assert all(equal(layer.merged.planes, merged_planes(layer)) for layer in layers if layer.merged)
    assert all(layer.merged for layer in layers)


def test_each_step_quantizes_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = LoraAdapter(rank=2, merge_aware=MergeAware(fraction=1.0))
    model = attached("q4_0", adapter)
    steps = Rounding(model, adapter, 2)
    calls = []
    right = rounding.merged_planes
    monkeypatch.setattr(rounding, "merged_planes", lambda *a, **k: calls.append(1) or right(*a, **k))
    steps.prepare(1)
    ids = torch.arange(8)[None]
    before = [model(ids).logits for _ in range(2)]  # two micro-batches
    assert torch.equal(*before) and len(calls) == 7
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter += 0.02
    assert torch.equal(model(ids).logits, before[0])  # the merged weights stay until the next step
    steps.prepare(2)
    assert len(calls) == 14 and not torch.equal(model(ids).logits, before[0])
    found = steps.to_dict()
    assert found is not None and found["formats"] == ["q4_0"] and found["packing_s"] > 0


def test_the_base_stays_what_it_is() -> None:
    """The first planes of an unchanged layer are the base's own; later steps must not write into them."""
    adapter = LoraAdapter(rank=2, merge_aware=MergeAware(fraction=1.0))
    model = llama("q4_0")
    adapters.attach(model, adapter, seed=0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".base." in name}
    steps = Rounding(model, adapter, 2)
    steps.prepare(1)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter += 0.05
    steps.prepare(2)
    assert all(torch.equal(model.get_parameter(name), plane) for name, plane in before.items())
    assert all(not equal(layer.merged.planes, layer.base.planes()) for layer in adapters.lora_modules(model).values())


def test_plain_adapters_are_left_alone() -> None:
    for adapter in (LoraAdapter(rank=2), QaLoraAdapter(kind="qa_lora", rank=2)):
        model = attached("q5_1", adapter)
        steps = Rounding(model, adapter, 4)
        steps.prepare(5)
        assert steps.to_dict() is None
        assert all(layer.merged is None for layer in adapters.lora_modules(model).values())


@pytest.mark.parametrize(
    ("base", "target", "text"), [("nf4", "q4_k", "block size 256"), ("none", None, "not quantized")]
)
def test_an_impossible_format_is_refused_before_the_first_step(base: str, target: Any, text: str) -> None:
    adapter = LoraAdapter(rank=2, merge_aware=MergeAware(format=target))
    model = attached(base, adapter)
    with pytest.raises((AdapterError, QuantizationError), match=text):
        Rounding(model, adapter, 100)


@pytest.mark.parametrize("base", ["nf4", "q4_0", "none"])
def test_formats_without_an_offset_refuse_qa_lora(base: str) -> None:
    model = llama(base)
    with pytest.raises(AdapterError) as error:
        adapters.attach(model, QaLoraAdapter(kind="qa_lora"), seed=0)
    text = str(error.value)
    assert "model.layers.0.self_attn.q_proj is stored as " + base in text and "and 4 more" in text
    assert "q4_1 or q5_1" in text
