"""Compares quantized fused experts with the modules of transformers, outputs and gradients."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ingle.config.base import Int8Base, Nf4Base
from ingle.errors import QuantizationError
from ingle.quant import QuantExperts, QuantLinear, QuantStack, audit, convert, make_format
from ingle.quant.experts import PROJECTIONS, quantize_experts

EXPERTS, HIDDEN, INNER, TOP_K = 5, 24, 16, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "moe_latent_size": None,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "moe_num_experts": EXPERTS,
    "_experts_implementation": "eager",
}
#: Module of transformers and class: plain, without a gate, and transposed with biases and a gate of its own.
CLASSES = [
    ("mixtral", "MixtralExperts"),
    ("qwen2_moe", "Qwen2MoeExperts"),
    ("qwen3_moe", "Qwen3MoeExperts"),
    ("olmoe", "OlmoeExperts"),
    ("deepseek_v3", "DeepseekV3Experts"),
    ("granitemoe", "GraniteMoeExperts"),
    ("nemotron_h", "NemotronHExperts"),
    ("gpt_oss", "GptOssExperts"),
]
BASES = [Nf4Base(format="nf4", block_size=32), Nf4Base(format="nf4", double_quant=False), Int8Base(format="int8")]


def make_experts(family: str, name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    experts: nn.Module = getattr(module, name)(SimpleNamespace(**SIZES)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return experts


def route(tokens: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, EXPERTS - 1, generator=generator, dtype=torch.float64)  # the last expert stays unused
    weights, index = scores.topk(TOP_K)
    return x, index, weights


def decode_into(plain: nn.Module, quantized: QuantExperts) -> None:
    """Gives a plain module the weights that a quantized one decodes to."""
    with torch.no_grad():
        for key, stack in quantized.named_children():
            if isinstance(stack, QuantStack):
                weights = torch.stack([stack.decode(e, torch.float64) for e in range(EXPERTS)])
                plain.get_parameter(key).copy_(weights.transpose(1, 2) if stack.transposed else weights)


@pytest.mark.parametrize("base", BASES, ids=lambda base: f"{base.format}-{getattr(base, 'double_quant', '')}")
@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_quantized_experts_answer_and_differentiate_as_plain_ones(family: str, name: str, base: Any) -> None:
    plain = make_experts(family, name)
    format = make_format(base)
    assert format is not None
    quantized = QuantExperts(copy.deepcopy(plain), dict.fromkeys(PROJECTIONS, format))
    assert {key for key, child in quantized.named_children() if isinstance(child, QuantStack)} == {
        key for key, parameter in plain.named_parameters() if parameter.dim() == 3
    }
    decode_into(plain, quantized)
    x, index, weights = route()
    ours, theirs = ([x.clone().requires_grad_(), weights.clone().requires_grad_()] for _ in range(2))
    y, expected = quantized(ours[0], index, ours[1]), plain(theirs[0], index, theirs[1])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-12, atol=1e-12)
    for key, parameter in plain.named_parameters():
        if parameter.dim() == 2:  # biases go on as they are
            torch.testing.assert_close(quantized.get_parameter(key).grad, parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("up", "down"), [("int8", "nf4"), (None, "int8"), ("nf4", None)])
@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "Qwen3MoeExperts"), ("gpt_oss", "GptOssExperts")])
def test_each_projection_has_its_own_format(family: str, name: str, up: str | None, down: str | None) -> None:
    plain = make_experts(family, name)
    bases = {"int8": BASES[2], "nf4": BASES[0]}
    formats = {key: make_format(bases[kind]) for key, kind in (("gate_up_proj", up), ("down_proj", down)) if kind}
    quantized = QuantExperts(copy.deepcopy(plain), formats)
    stacks = {key: child.format.name for key, child in quantized.named_children() if isinstance(child, QuantStack)}
    assert stacks == {key: format.name for key, format in formats.items() if format is not None}
    decode_into(plain, quantized)
    x, index, weights = route()
    torch.testing.assert_close(quantized(x, index, weights), plain(x, index, weights), rtol=1e-12, atol=1e-12)


def test_llama_4_experts_answer_and_differentiate_as_plain_ones() -> None:
    plain = make_experts("llama4", "Llama4TextExperts")
    format = make_format(BASES[0])
    quantized = quantize_experts(copy.deepcopy(plain), dict.fromkeys(PROJECTIONS, format), name="experts")
    decode_into(plain, quantized)
    x, index, weights = route()
    scores = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter(1, index, weights)  # the last expert gets none
    scaled = (x * scores.t()[..., None]).flatten(0, 1)
    ours, theirs = (scaled.clone().requires_grad_() for _ in range(2))
    y, expected = quantized(ours), plain(theirs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_every_expert_is_quantized_on_its_own() -> None:
    plain = make_experts("mixtral", "MixtralExperts")
    format = make_format(BASES[0])
    assert format is not None
    quantized = QuantExperts(copy.deepcopy(plain), dict.fromkeys(PROJECTIONS, format))
    stack = quantized.get_submodule("down_proj")
    assert isinstance(stack, QuantStack)
    for expert in range(EXPERTS):
        alone = format.encode(plain.get_parameter("down_proj")[expert])
        assert all(torch.equal(stack.expert_planes(expert)[name], plane) for name, plane in alone.items())
    assert stack.num_weights == EXPERTS * HIDDEN * INNER


def test_indices_beyond_the_experts_mean_none() -> None:
    format = make_format(BASES[2])
    assert format is not None
    quantized = QuantExperts(make_experts("mixtral", "MixtralExperts"), dict.fromkeys(PROJECTIONS, format))
    x, index, weights = route()
    some = index.clone()
    some[:, 1] = EXPERTS
    alone = quantized(x, index[:, :1], weights[:, :1])
    assert torch.equal(quantized(x, some, weights), alone)


def test_backward_keeps_no_decoded_weight() -> None:
    format = make_format(BASES[0])
    assert format is not None
    quantized = QuantExperts(
        make_experts("mixtral", "MixtralExperts", torch.float32), dict.fromkeys(PROJECTIONS, format)
    )
    shapes: list[tuple[int, ...]] = []
    x, index, weights = (t.float() if t.is_floating_point() else t for t in route())
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        quantized(x, index, weights)
    assert shapes
    assert not {(2 * INNER, HIDDEN), (HIDDEN, INNER), (INNER, HIDDEN)} & set(shapes)


def make_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    match family:
        case "mixtral":
            config: Any = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
        case _:
            config = Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_whole_model_answers_as_one_with_the_decoded_weights(family: str) -> None:
    model = make_model(family, torch.float64)
    plain = copy.deepcopy(model)
    convert(model, BASES[0])
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            target = plain.get_submodule(name)
            with torch.no_grad():
                for key in ("gate_up_proj", "down_proj"):
                    stack = module.get_submodule(key)
                    weights = [stack.decode(e, torch.float64) for e in range(module.num_experts)]
                    target.get_parameter(key).copy_(torch.stack(weights))
        elif isinstance(module, QuantLinear):
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(module.decode(torch.float64))
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, expected = model(ids).logits, plain(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # routers, norms, embeddings, head: all behind quantized layers
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
    report = audit(model)
    kinds = {row.class_name: row for row in report.classes}
    assert kinds["QuantStack"].modules == 4
    assert kinds["Linear"].modules == 1  # the output head
    assert report.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert any("gate" in left.name and left.class_name.endswith("TopKRouter") for left in report.unquantized)


class OddExperts(nn.Module):
    """Experts in a layout nobody knows."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))


class Lookup(nn.Module):
    """Three dimensions, and nothing in its name."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(*shape))


@pytest.mark.parametrize("odd", [OddExperts(4, 8, 8), OddExperts(32, 8), Lookup(4, 3, 4)])
def test_unknown_layouts_are_refused_by_name(odd: nn.Module) -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"moe": odd}), "plain": nn.Linear(8, 8)})
    with pytest.raises(QuantizationError, match=type(odd).__name__) as caught:
        convert(model, BASES[0])
    assert "block.moe" in str(caught.value)


def test_harmless_parameters_are_not_refused() -> None:
    """Few weights stay as they are, such as the gates of a recurrent state."""
    model = nn.ModuleDict(
        {"cls": Lookup(1, 1, 8), "gates": Lookup(2, 2, 4), "conv": nn.Conv2d(3, 4, 5), "plain": nn.Linear(8, 8)}
    )
    convert(model, BASES[0])
    assert isinstance(model["plain"], QuantLinear)
    assert {left.name for left in audit(model).unquantized} == {"cls", "conv", "gates"}
