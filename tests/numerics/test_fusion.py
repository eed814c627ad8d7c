"""Fused decoder layers against the layers that they replace: outputs, every gradient, and when they are not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ingle import adapters
from ingle.adapters import fusion
from ingle.adapters.fusion import FusedLayer
from ingle.config.adapter import DoraAdapter, LoraAdapter
from ingle.config.base import Nf4Base
from ingle.data.batch import Batch
from ingle.kernels.layers import decoder_layer
from ingle.models import forward_hidden
from ingle.quant import convert
from tests.tiny import SIZES, make_random

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": LlamaConfig(**SIZES, head_dim=32),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def make(
    config: PretrainedConfig, dtype: torch.dtype, adapter: LoraAdapter | DoraAdapter, *, quantized: bool = False
) -> Any:
    model = make_random(config, dtype)
    if quantized:
        convert(model, Nf4Base(format="nf4", double_quant=False))
    adapters.attach(model, adapter, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapters.trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def batch(lengths: tuple[int, ...] = (9, 1, 20, 3)) -> Batch:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.arange(sum(lengths)) * 7 % 64
    columns = {"input_ids": ids[None], "labels": ids[None], "position_ids": positions[None], "cu_seqlens": bounds}
    return Batch(columns, sum(lengths), len(lengths), sum(lengths))


def run(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(5)  # dropout
    hidden = forward_hidden(model, batch())
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)
    trained = dict(adapters.trainable_parameters(model))
    gradients = torch.autograd.grad((hidden * weights).sum(), list(trained.values()))
    return {"hidden": hidden.detach()} | dict(zip(trained, gradients, strict=True))


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        error = (ours[name].double() - wanted.double()).norm() / wanted.double().norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_layers_give_the_outputs_and_gradients_of_the_layers_they_replace(name: str, dtype: torch.dtype) -> None:
    model = make(CONFIGS[name], dtype, LoraAdapter(rank=3))
    theirs = run(model)
    paths = [path for path, _ in model.named_parameters()]
    report = adapters.fuse(model)
    assert (report.fused, report.reasons) == (2, {})
    assert [path for path, _ in model.named_parameters()] == paths
    ours = run(model)
    if dtype == torch.float32:
        compare(ours, theirs, TOLERANCE[dtype])
        return
    # In bfloat16 both have errors; ours may exceed those of the original layers only by chance.
    exact = run(make(CONFIGS[name], torch.float32, LoraAdapter(rank=3)))
    compare(ours, exact, TOLERANCE[dtype])
    errors = [sum((side[n].float() - w).norm() / w.norm() for n, w in exact.items()) for side in (ours, theirs)]
    assert errors[0] <= 1.3 * errors[1]


DORA = DoraAdapter(kind="dora", rank=3)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [*((name, LoraAdapter(rank=3)) for name in CONFIGS), ("llama-biased", DORA), ("qwen3", DORA)],
    ids=[*CONFIGS, "dora-biased", "dora-qwen3"],
)
def test_attention_in_parts_as_on_a_cuda_device(
    name: str, adapter: LoraAdapter | DoraAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(CONFIGS[name], torch.float32, adapter)
    theirs = run(model)

    class Parts:
        @staticmethod
        def of(bounds: Tensor, heads: Any, *, causal: bool, window: int | None) -> decoder_layer.Boundaries:
            return decoder_layer.Boundaries(heads, bounds, window, longest=None)

    monkeypatch.setattr(fusion, "AttentionSpans", Parts)
    assert adapters.fuse(model).fused == 2
    compare(run(model), theirs, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "adapter",
    [
        LoraAdapter(rank=3, dropout=0.3),
        LoraAdapter(rank=3, target_modules=("q_proj", "down_proj")),
        LoraAdapter(rank=3, target_modules=("layers.1.mlp.up_proj", "lm_head")),
        DORA,
        DoraAdapter(kind="dora", rank=3, init="pissa", target_modules=("v_proj", "gate_proj", "down_proj")),
    ],
    ids=["dropout", "some-linears", "one-layer", "dora", "dora-some-linears"],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_dropout_plain_linears_and_quantized_bases(adapter: LoraAdapter | DoraAdapter, quantized: bool) -> None:
    model = make(CONFIGS["llama"], torch.float32, adapter, quantized=quantized)
    if adapter.dropout:  # eager layers draw masks in another order: fused layers are compared with themselves
        adapters.fuse(model)
        first, again = run(model), run(model)
        compare(first, again, 0.0)
        model.eval()
        quiet = run(model)
        assert (quiet["hidden"] - first["hidden"]).norm() > 0.01 * first["hidden"].norm()
        for module in adapters.lora_modules(model).values():
            module.dropout = 0.0
        compare(run(model), quiet, 0.0)
        return
    trained = {n for n, _ in adapters.trainable_parameters(model) if "lm_head" not in n}
    for module in adapters.lora_modules(model).values():
        if module is model.lm_head:
            module.requires_grad_(False)
    theirs = run(model)
    assert adapters.fuse(model).fused == 2
    ours = run(model)
    assert trained <= ours.keys()
    compare(ours, theirs, 2e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recompute_changes_nothing(dropout: float) -> None:
    adapter = LoraAdapter(rank=3, dropout=dropout)
    plain = make(CONFIGS["llama"], torch.bfloat16, adapter)
    adapters.fuse(plain)
    again = make(CONFIGS["llama"], torch.bfloat16, adapter)
    again.activation_checkpointing_enable({"use_reentrant": False})
    adapters.fuse(again)
    compare(run(again), run(plain), 0.0)


def test_disabled_adapters_are_off_in_fused_layers() -> None:
    model = make(CONFIGS["llama"], torch.float32, LoraAdapter(rank=3))
    with torch.no_grad(), adapters.disabled(model):
        base = forward_hidden(model, batch())
    adapters.fuse(model)
    with torch.no_grad(), adapters.disabled(model):
        torch.testing.assert_close(forward_hidden(model, batch()), base, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (forward_hidden(model, batch()) - base).norm() > 0.01 * base.norm()


def test_generation_uses_the_original_layers() -> None:
    model = make(CONFIGS["llama"], torch.float32, LoraAdapter(rank=3)).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        wanted = model(ids, use_cache=True)
        adapters.fuse(model)
        ours = model(ids, use_cache=True)
        more = model(torch.tensor([[6]]), past_key_values=ours.past_key_values, use_cache=True)
    assert torch.equal(ours.logits, wanted.logits) and more.logits.shape == (1, 1, 64)


def test_a_second_backward_raises() -> None:
    model = make(CONFIGS["llama"], torch.float32, LoraAdapter(rank=3))
    adapters.fuse(model)
    loss = forward_hidden(model, batch()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run only once"):
        loss.backward()


def test_other_layers_are_not_fused_and_the_report_has_the_reason() -> None:
    other = make(OlmoConfig(**SIZES), torch.float32, LoraAdapter(rank=3))
    assert adapters.fuse(other).reasons == {"OlmoDecoderLayer is not among the fused architectures": 2}
    whole = make(CONFIGS["llama"], torch.float32, LoraAdapter(rank=3, trainable_modules=("layers.1.mlp",)))
    report = adapters.fuse(whole)
    assert (report.fused, report.reasons) == (1, {"weights other than its adapters are trained": 1})
    gelu = LlamaConfig(**SIZES, hidden_act="gelu")
    assert "not SiLU" in next(iter(adapters.fuse(make(gelu, torch.float32, LoraAdapter(rank=3))).reasons))


def test_a_wrong_kernel_is_not_used(monkeypatch: Any) -> None:
    """The self-check at the start finds errors in forward and in backward."""
    model = make(CONFIGS["llama"], torch.float32, LoraAdapter(rank=3))
    right = decoder_layer.swiglu
    monkeypatch.setattr(decoder_layer, "swiglu", lambda gate, up: right(gate, up) * 1.01)
    report = adapters.fuse(model)
    assert report.fused == 0 and "answer differs" in next(iter(report.reasons))
    assert not any(isinstance(module, FusedLayer) for module in model.modules())
    monkeypatch.setattr(decoder_layer, "swiglu", right)
    ungroup = decoder_layer.ungroup_rows
    monkeypatch.setattr(
        decoder_layer, "ungroup_rows", lambda g, out, by, heads, rotary=None: ungroup(g, out, by, heads)
    )
    report = adapters.fuse(model)
    assert report.fused == 0 and "gradient differs" in next(iter(report.reasons))


def test_the_self_check_runs_once_for_equal_layers(monkeypatch: Any) -> None:
    calls = []
    right = fusion.disagreement
    monkeypatch.setattr(fusion, "disagreement", lambda *layers: calls.append(1) or right(*layers))
    adapters.fuse(make(CONFIGS["qwen2-window"], torch.float32, LoraAdapter(rank=3)))
    assert len(calls) == 2  # one layer has a window, the other has none
