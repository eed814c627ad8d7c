"""Figures of a quantized model against the same figures computed directly in float64 from all logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from ingle.config.base import base_section
from ingle.data import IGNORE_INDEX, Sample
from ingle.evaluation.format_survey.trial import FormatTrial, quality_of
from ingle.evaluation.run.divergence import compare, record_reference
from ingle.evaluation.run.windows import Window, pack_windows
from ingle.quant import make_format
from ingle.quant.imatrix_collector import linear_maps
from tests.tiny import make_random

LLAMA = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=128)


def make(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    return make_random(config, dtype, std=0.2).eval()


def windows() -> list[Window]:
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate((40, 7, 25, 60)):
        ids = rng.integers(0, 300, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 3 + 1] = IGNORE_INDEX  # a prompt
        made.append(Window(index, Sample(ids, labels)))
    return made


def logits_in_float64(config: PretrainedConfig, state: dict[str, Tensor]) -> list[Tensor]:
    """Log-probabilities of every scored token's predecessor, window by window in the order of the rows."""
    from transformers import AutoModelForCausalLM

    config._attn_implementation = "eager"
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    plain.load_state_dict({name: value.double() for name, value in state.items()})
    found = []
    with torch.no_grad():
        for row in pack_windows(windows()):
            for window in row:
                ids = torch.from_numpy(window.sample.input_ids).long()[None]
                logps = plain(input_ids=ids).logits[0].log_softmax(-1)
                kept = torch.from_numpy(window.sample.labels[1:] != IGNORE_INDEX)
                found.append(logps[:-1][kept])
    return found


def targets() -> list[Tensor]:
    return [
        torch.from_numpy(window.sample.labels[1:][window.sample.labels[1:] != IGNORE_INDEX]).long()
        for row in pack_windows(windows())
        for window in row
    ]


def decoded(model: Any, name: str, format: Any) -> Tensor:
    weight = model.get_parameter(name).detach()
    transposed = type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
    weight = weight.t() if transposed else weight
    value = format.decode_reference(format.encode(weight), *weight.shape, torch.float32)
    return value.t() if transposed else value


@pytest.mark.parametrize("kind", ["q4_0", "nf4", "hqq"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_figures_are_those_of_float64(config: PretrainedConfig, kind: str) -> None:
    model = make(config)
    format = make_format(base_section(kind))
    assert format is not None
    names = [f"{name}.weight" for name in linear_maps(model)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = next(name for name, p in model.named_parameters() if p is model.get_output_embeddings().weight)

    reference = record_reference(model, windows())
    with FormatTrial(model).quantized(dict.fromkeys([*names, table], format)) as cost:
        found = compare(model, reference, windows())
    assert cost.decode_weights_per_s and cost.decode_weights_per_s > 0

    quantized = dict(before)
    for name in [*names, table]:
        quantized[name] = decoded(model, name, format)
    if "lm_head.weight" in quantized:
        quantized["lm_head.weight"] = quantized[table]
    theirs, ours = logits_in_float64(config, before), logits_in_float64(config, quantized)
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(theirs, ours, strict=True)])
    nll = torch.cat([-q.gather(1, t[:, None])[:, 0] for q, t in zip(ours, targets(), strict=True)])
    base_nll = torch.cat([-p.gather(1, t[:, None])[:, 0] for p, t in zip(theirs, targets(), strict=True)])
    agrees = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(theirs, ours, strict=True)])

    np.testing.assert_allclose(found.kl, kl.numpy(), rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(found.nll, nll.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.reference_nll, base_nll.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.agrees, agrees.numpy())
    means = found.divergence()
    assert means.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert means.top1_agreement == float(agrees.double().mean())
    assert means.perplexity_first == pytest.approx(math.exp(float(base_nll.mean())), rel=1e-4)
    assert means.perplexity_second == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert means.num_tokens == len(nll)
    quality = quality_of(found)
    assert quality.perplexity.value == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert quality.loss.value == pytest.approx(float((nll - base_nll).mean()), abs=1e-4)
    assert quality.kl.value == pytest.approx(float(kl.mean()), rel=1e-3)
    assert quality.kl_99 == pytest.approx(float(np.quantile(kl.numpy(), 0.99)), rel=1e-3)
    assert quality.top_1.value == float(agrees.double().mean())
    for figure in (quality.perplexity, quality.loss, quality.kl, quality.top_1):
        assert figure.low is not None and figure.high is not None
        assert figure.low <= figure.value <= figure.high

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_unquantized_model_does_not_diverge_from_itself() -> None:
    model = make(LLAMA, torch.bfloat16)
    reference = record_reference(model, windows())
    found = compare(model, reference, windows())
    quality = quality_of(found)
    assert quality.kl.value == quality.loss.value == quality.kl_99 == 0
    assert quality.top_1.value == 1


def test_an_error_while_quantizing_restores_every_weight() -> None:
    from ingle.errors import QuantizationError

    model = make(LLAMA)
    names = [f"{name}.weight" for name in linear_maps(model)]
    with torch.no_grad():
        model.get_parameter(names[-1])[0, 0] = math.nan
    format = make_format(base_section("q8_0"))
    assert format is not None
    with pytest.raises(QuantizationError), FormatTrial(model).quantized(dict.fromkeys(names, format)):
        pytest.fail("NaN was quantized")
    assert [f"{name}.weight" for name in linear_maps(model)] == names
    assert all(type(model.get_submodule(name.removesuffix(".weight"))) is torch.nn.Linear for name in names)


def test_importance_reaches_the_encoder() -> None:
    model = make(LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 256, "head_dim": 64}))
    name = "model.layers.0.self_attn.q_proj.weight"
    format = make_format(base_section("q4_k"))
    assert format is not None
    importance = {name: torch.rand(256, generator=torch.Generator().manual_seed(0))}
    trial = FormatTrial(model)
    held = []
    for given in (None, importance):
        with trial.quantized({name: format}, given):
            held.append(model.get_submodule(name.removesuffix(".weight")).data.clone())
    expected = format.encode(model.get_parameter(name).detach(), importance[name])["data"]
    assert torch.equal(held[1], expected) and not torch.equal(held[0], held[1])
