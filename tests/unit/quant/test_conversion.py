"""Tests which modules ``convert`` replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from ingle.config.base import Int8Base, Nf4Base, NoBase
from ingle.errors import QuantizationError
from ingle.quant import QuantLinear, audit, convert, describe_unknown

NF4 = Nf4Base(format="nf4")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_llama(*, tied: bool = False, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=64, tie_word_embeddings=tied, attention_bias=True)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_linear_but_the_head_is_quantized(tied: bool, device: str) -> None:
    model = make_llama(tied=tied, device=device)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    convert(model, NF4)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert quantized == linears - {"lm_head"}
    assert type(model.lm_head) is nn.Linear
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert all(p.is_meta == (device == "meta") for p in model.parameters())


def test_none_changes_nothing() -> None:
    model = make_llama()
    before = list(model.named_modules())
    convert(model, NoBase())
    assert list(model.named_modules()) == before


def test_converting_twice_is_converting_once() -> None:
    model = make_llama()
    convert(model, NF4)
    planes = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, NF4)
    assert all(torch.equal(tensor, planes[name]) for name, tensor in model.state_dict().items())


def test_conv1d_is_turned() -> None:
    layer = Conv1D(48, 32)  # out, in; its weight is [in, out]
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 32)
    expected = layer(x)
    model = nn.ModuleDict({"c_fc": layer})
    convert(model, Int8Base(format="int8"))
    quantized = model["c_fc"]
    assert isinstance(quantized, QuantLinear)
    assert quantized.transposed
    assert (quantized.out_features, quantized.in_features) == (48, 32)
    torch.testing.assert_close(quantized(x), expected, rtol=0.05, atol=0.1)


def test_all_of_gpt2_is_quantized() -> None:
    model = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    convert(model, NF4)
    report = audit(model)
    assert {row.class_name for row in report.classes if row.quantized} == {"QuantLinear"}
    assert {left.class_name for left in report.unquantized} == {"Embedding"}
    assert report.quantized == 12 * 32 * 32


def test_nan_in_a_model_is_named() -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        convert(model, NF4)


def test_tied_linears_and_subclasses_stay_and_are_counted() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"embed": nn.Embedding(16, 8), "out": nn.Linear(8, 16, bias=False)})
    model["out"].weight = model["embed"].weight
    model["special"] = Special(8, 8)
    model["attention"] = nn.MultiheadAttention(8, 2)
    model["plain"] = nn.Linear(8, 8)
    convert(model, NF4)
    assert type(model["out"]) is nn.Linear
    assert isinstance(model["plain"], QuantLinear)
    left = {entry.name for entry in audit(model).unquantized}
    assert left == {"embed", "special", "attention", "attention.out_proj"}
    x = torch.randn(3, 1, 8)
    model["attention"](x, x, x)  # reads its projection's weight itself


def test_a_module_used_twice_is_quantized_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    convert(model, NF4)
    assert isinstance(model["a"], QuantLinear)
    assert model["a"] is model["b"]


def test_training_mode_and_frozen_biases_are_kept() -> None:
    model = make_llama().eval()
    model.model.layers[0].self_attn.q_proj.bias.requires_grad_(False)
    convert(model, NF4)
    assert not any(module.training for module in model.modules())
    assert not model.model.layers[0].self_attn.q_proj.bias.requires_grad
    assert model.model.layers[0].self_attn.k_proj.bias.requires_grad


def test_weights_in_an_unknown_layout_are_counted_or_refused() -> None:
    class Gates(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.zeros(2, size, 8))

    def model(size: int) -> nn.Module:
        return nn.ModuleDict({"linear": nn.Linear(64, 64, bias=False), "gates": Gates(size)})

    assert describe_unknown(nn.Linear(64, 64)) is None
    told = describe_unknown(model(16))
    assert told is not None and told.startswith("256 weights (5.9% of the model) are not quantized, because Gates")
    convert(model(16), NF4)
    with pytest.raises(QuantizationError, match="Gates"):
        convert(model(128), NF4)
