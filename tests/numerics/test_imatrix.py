"""Compares importance matrices with inputs recorded in float64, for plain, quantized, adapted and fused models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from ingle import adapters
from ingle.config.adapter import LoraAdapter
from ingle.config.base import Nf4Base
from ingle.data.batch import Batch
from ingle.errors import QuantizationError
from ingle.models import forward_hidden, recompute_layers
from ingle.quant import convert
from ingle.quant.imatrix_collector import ImatrixCollector, linear_maps
from tests.tiny import SIZES, make_random

GPT2 = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64)


def make(config: PretrainedConfig, dtype: torch.dtype, *, adapted: bool, quantized: bool) -> Any:
    model = make_random(config, dtype)
    if quantized:
        convert(model, Nf4Base(format="nf4"))
    if adapted:
        adapters.attach(model, LoraAdapter(rank=4), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in adapters.trainable_parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def batch(seed: int, lengths: tuple[int, ...] = (9, 1, 20, 3), padding: int = 0) -> Batch:
    spans = (*lengths, padding) if padding else lengths
    bounds = torch.tensor([0, *torch.tensor(spans).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in spans])
    ids = torch.randint(64, (1, sum(spans)), generator=torch.Generator().manual_seed(seed))
    columns = {"input_ids": ids, "labels": ids, "position_ids": positions[None], "cu_seqlens": bounds}
    return Batch(columns, sum(lengths), len(lengths), sum(lengths))


def catch(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    """Mean squares of what the linear maps are called with, in float64, by plain hooks."""
    caught: dict[str, list[Tensor]] = {name: [] for name in linear_maps(model)}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, rows=rows: rows.append(arguments[0].detach().double().flatten(0, -2))
        )
        for name, rows in caught.items()
    ]
    for each in batches:
        forward_hidden(model, each)
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": torch.cat(rows).square().mean(0) for name, rows in caught.items()}


def assert_close(collector: ImatrixCollector, expected: dict[str, Tensor], count: int, rtol: float = 1e-6) -> None:
    entries = collector.entries()
    assert set(entries) == set(expected)
    for name, entry in entries.items():
        assert entry.count == count, name
        torch.testing.assert_close(entry.mean.double(), expected[name], rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES, head_dim=16), GPT2], ids=lambda c: c.model_type
)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "lora"])
def test_means_are_those_of_the_inputs(config: PretrainedConfig, quantized: bool, adapted: bool) -> None:
    model = make(config, torch.float32, adapted=adapted, quantized=quantized)
    batches = [batch(1), batch(2, (5, 40))]
    expected = catch(model, batches)
    collector = ImatrixCollector(model)
    for each in batches:
        with collector.opened(each.num_tokens):
            forward_hidden(model, each)
    assert_close(collector, expected, count=33 + 45)
    assert not any("lm_head" in name or ".base" in name for name in expected)


def test_a_fused_model_is_seen_as_well() -> None:
    model = make(LlamaConfig(**SIZES), torch.float32, adapted=True, quantized=True)
    expected = catch(model, [batch(1)])
    assert adapters.fuse(model).fused == 2
    collector = ImatrixCollector(model)
    with collector.opened(33):
        hidden = forward_hidden(model, batch(1))
    hidden.sum().backward()
    assert_close(collector, expected, count=33, rtol=2e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["layers", "fused"])
def test_what_recompute_runs_again_counts_once(fused: bool) -> None:
    model = make(LlamaConfig(**SIZES), torch.float32, adapted=True, quantized=False).train()
    expected = catch(model, [batch(1)])
    recompute_layers(model)
    if fused:
        assert adapters.fuse(model).fused == 2
    collector = ImatrixCollector(model)
    with collector.opened(33):
        hidden = forward_hidden(model, batch(1))
    hidden.sum().backward()
    assert_close(collector, expected, count=33, rtol=2e-4)


def test_padding_does_not_count() -> None:
    model = make(LlamaConfig(**SIZES), torch.float32, adapted=False, quantized=False)
    expected = catch(model, [batch(1)])
    padded = batch(1, padding=15)
    padded.input_ids[0, :33] = batch(1).input_ids[0]
    collector = ImatrixCollector(model)
    with collector.opened(padded.num_tokens):
        forward_hidden(model, padded)
    assert_close(collector, expected, count=33, rtol=1e-5)


def test_nothing_counts_outside() -> None:
    model = make(LlamaConfig(**SIZES), torch.float32, adapted=False, quantized=False)
    collector = ImatrixCollector(model)
    forward_hidden(model, batch(1))
    assert all(entry.count == 0 and not entry.sums.any() for entry in collector.entries().values())
    assert all(bool((entry.mean == 1).all()) for entry in collector.entries().values())


def test_a_bystander_changes_nothing_and_leaves_nothing_behind() -> None:
    model = make(LlamaConfig(**SIZES), torch.bfloat16, adapted=True, quantized=True)
    before = forward_hidden(model, batch(1))
    collector = ImatrixCollector(model)
    with collector.opened(33):
        assert torch.equal(forward_hidden(model, batch(1)), before)
    collector.remove()
    counts = [entry.count for entry in collector.entries().values()]
    with collector.opened(33):
        forward_hidden(model, batch(1))
    assert counts == [entry.count for entry in collector.entries().values()] == [33] * len(counts)


def test_a_collector_goes_on_to_the_bit() -> None:
    model = make(LlamaConfig(**SIZES), torch.float32, adapted=True, quantized=False)
    collector = ImatrixCollector(model)
    states = []
    for seed in (1, 2):
        with collector.opened(33):
            forward_hidden(model, batch(seed))
        states.append({name: tensor.clone() for name, tensor in collector.state_dict().items()})
    collector.load_state_dict(states[0])
    with collector.opened(33):
        forward_hidden(model, batch(2))
    again = collector.state_dict()
    assert again.keys() == states[1].keys()
    assert all(torch.equal(again[name], states[1][name]) for name in again)


def test_another_models_state_is_refused() -> None:
    collector = ImatrixCollector(make(LlamaConfig(**SIZES), torch.float32, adapted=False, quantized=False))
    other = ImatrixCollector(make(GPT2, torch.float32, adapted=False, quantized=False))
    with pytest.raises(QuantizationError, match="another model"):
        collector.load_state_dict(other.state_dict())


def test_sums_of_many_rows_keep_their_digits() -> None:
    from ingle.kernels.layers.importance import sum_of_squares

    x = (torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    expected = x.double().square().sum(0)
    torch.testing.assert_close(sum_of_squares(x), expected, rtol=1e-6, atol=0)
