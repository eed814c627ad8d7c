"""Tests the choice of formats: options, mixes, and the two ends of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from ingle import adapters, quant
from ingle.config.adapter import LoraAdapter
from ingle.config.base import BaseConfig, Nf4Base, NoBase, base_section, base_sections, format_name
from ingle.config.ggml import MixBase
from ingle.errors import QuantizationError
from ingle.quant import GgufFormats, QuantEmbedding, QuantLinear, make_format, make_formats, quantize_ends
from ingle.quant.catalog import format_options
from ingle.training.model_shape import model_shape


def build(model_type: str = "llama", **changes: Any) -> Any:
    settings = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    }
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def formats_of(model: Any) -> dict[str, str]:
    return {name: module.format.name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def test_a_mix_holds_each_module_as_llama_cpp_would() -> None:
    model = build()
    quant.convert(model, base_section("q4_k_m"))
    found = formats_of(model)
    wide = {0, 3, 6, 7}  # the first eighth, the last one, and every third layer between
    for layer in range(8):
        for part in ("self_attn.v_proj", "mlp.down_proj"):
            assert found[f"model.layers.{layer}.{part}"] == ("q6_k" if layer in wide else "q4_k")
        assert found[f"model.layers.{layer}.mlp.gate_proj"] == "q4_k"
    assert len(found) == 7 * 8 and not isinstance(model.get_output_embeddings(), QuantLinear)
    rows = {row.format: row.modules for row in quant.audit(model).classes if row.class_name == "QuantLinear"}
    assert rows == {"q4_k": 48, "q6_k": 8}
    scratches = {id(m.format.scratch) for m in model.modules() if isinstance(m, QuantLinear)}
    assert len(scratches) == 1


def test_rows_that_are_not_whole_blocks_get_what_llama_cpp_gives_them() -> None:
    model = build(intermediate_size=96 * 4, hidden_size=96, num_attention_heads=4)
    quant.convert(model, base_section("q4_k_m"))
    found = formats_of(model)
    assert found["model.layers.0.self_attn.q_proj"] == "q5_0" and found["model.layers.0.mlp.down_proj"] == "q8_0"
    assert found["model.layers.1.mlp.down_proj"] == "q5_0"
    model = build(hidden_size=80, num_attention_heads=4)
    quant.convert(model, base_section("q5_k_s"))
    assert "model.layers.0.self_attn.q_proj" not in formats_of(model)  # float16 for llama.cpp
    assert formats_of(model)["model.layers.0.mlp.down_proj"] == "q5_k"


def test_the_planner_counts_what_the_modules_take() -> None:
    model = build()
    base = base_section("q3_k_l")
    shape = model_shape(model, adapters.select(model, LoraAdapter()), make_formats(base, model))
    planned = sum(lin.num_weights * lin.count * (lin.bits_per_weight or 0) / 8 for lin in shape.linears)
    quant.convert(model, base)
    held = sum(row.bytes for row in quant.audit(model).classes if row.class_name == "QuantLinear")
    assert planned == held > 0


def test_rules_of_an_unknown_architecture_are_refused() -> None:
    model = build("gptj")
    with pytest.raises(QuantizationError, match="q4_k_m in this architecture are unknown") as info:
        quant.convert(model, base_section("q4_k_m"))
    assert "--base.format=q4_k," in str(info.value)
    assert make_formats(NoBase(), model) is None


@pytest.mark.parametrize("tied", [True, False])
def test_both_ends_are_quantized_and_answer_as_decoded(tied: bool) -> None:
    model = build(num_hidden_layers=1, tie_word_embeddings=tied).eval()
    ids = torch.randint(64, (2, 5))
    embedding, head = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    make = GgufFormats()
    chosen = {"model.embed_tokens": make("q6_k"), "lm_head": make("q8_0")}
    quantize_ends(model, lambda name, out_features, in_features: chosen.get(name))
    quantized, linear = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(quantized, QuantEmbedding) and isinstance(linear, QuantLinear)
    assert (linear.get_parameter("data") is quantized.get_parameter("data")) == tied
    assert linear.format.name == ("q6_k" if tied else "q8_0")
    quantized.get_parameter("data").copy_(quantized.format.encode(embedding)["data"])
    if not tied:
        linear.get_parameter("data").copy_(linear.format.encode(head)["data"])
    assert torch.equal(quantized(ids), quantized.format.decode(quantized.planes(), 64, 256, torch.float32)[ids])
    hidden = torch.randn(3, 256)
    assert torch.equal(linear(hidden), hidden @ linear.decode(torch.float32).T)
    assert quant.audit(model).quantized == (64 * 256 if tied else 2 * 64 * 256)


def test_an_embedding_that_scales_is_quantized_too() -> None:
    model = build("gemma3_text", num_hidden_layers=1, head_dim=64).eval()
    embedding, ids = model.get_input_embeddings(), torch.randint(64, (2, 5))
    make = GgufFormats()
    quantize_ends(model, lambda name, out_features, in_features: make("q8_0"))
    quantized = model.get_input_embeddings()
    assert isinstance(quantized, QuantEmbedding) and isinstance(model.get_output_embeddings(), QuantLinear)
    quantized.get_parameter("data").copy_(quantized.format.encode(embedding.weight.detach())["data"])
    error = (quantized(ids) - embedding(ids)).norm() / embedding(ids).norm()
    assert 0 < error < 0.01


def test_an_embedding_of_an_unknown_class_stays() -> None:
    class Odd(torch.nn.Embedding):
        pass

    model = build(num_hidden_layers=1)
    model.set_input_embeddings(Odd(64, 256))
    model.tie_weights()
    before = model.get_input_embeddings(), model.get_output_embeddings()
    make = GgufFormats()
    quantize_ends(model, lambda name, out_features, in_features: make("q8_0"))
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == before


QUANTIZED = [
    *(base_section({"format": format_name(s)}) for s in base_sections() if not issubclass(s, MixBase | NoBase)),
    Nf4Base(format="nf4", block_size=128, double_quant=False),
]


@pytest.mark.parametrize("base", QUANTIZED, ids=str)
def test_options_of_a_format_choose_it_again(base: BaseConfig) -> None:
    format = make_format(base)
    assert format is not None
    words = [word.removeprefix("--base.").split("=") for word in format_options(format).split()]
    assert make_format(base_section({key: yaml.safe_load(value) for key, value in words})) == format


def test_formats_that_share_a_scratch_keep_their_own_codebooks() -> None:
    """The reference decodes with a table, which other devices than the CPU use for GGUF files of several types."""
    shared = GgufFormats()
    generator = torch.Generator().manual_seed(0)
    for name in ("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_m"):
        own: Any = make_format(base_section({"format": name}))
        among_others: Any = shared(name)
        num_bytes = own.plane_specs(4, 256)["data"].shape[1]
        blocks = torch.randint(0, 32, (4, 1, num_bytes), dtype=torch.uint8, generator=generator)
        assert torch.equal(among_others.dequantize_blocks(blocks), own.dequantize_blocks(blocks)), name
