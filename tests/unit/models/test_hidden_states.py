"""The two halves of a model, and the verification that detects what they cannot express."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from ingle import models, quant
from ingle.errors import ModelError
from ingle.models.forward import attention
from ingle.models.forward.hidden_states import forward_packed
from ingle.quant.int8 import Int8


def test_the_head_scales_and_caps() -> None:
    head = models.Head(torch.eye(2), torch.tensor([0.0, 1.0]), logit_scale=2.0, softcap=3.0)
    expected = 3 * torch.tanh(torch.tensor([2.0, 2.0]) / 3)
    torch.testing.assert_close(head.logits(torch.tensor([1.0, 0.0])), expected)


def test_verification_keeps_the_training_mode(model: PreTrainedModel) -> None:
    model.train()
    models.verify(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_an_unknown_head_is_detected(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.forward

    def shifted(**arguments: Tensor) -> object:
        output = forward(**arguments)
        output.logits = output.logits + torch.linspace(0, 3, output.logits.shape[-1])
        return output

    monkeypatch.setattr(model, "forward", shifted)
    with pytest.raises(ModelError, match="different results for packed documents"):
        models.verify(model)


def test_attention_between_documents_is_detected(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[..., Tensor] = attention.packed_attention

    def leak(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options: object) -> Tensor:
        return honest(q, k, v, cu_seqlens[[0, -1]], **options)

    monkeypatch.setattr(attention, "packed_attention", leak)
    with pytest.raises(ModelError, match="different results for packed documents"):
        models.verify(model)


def test_boundaries_also_come_with_the_mask(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model.model.layers[0].self_attn
    forward = layer.forward

    def drop(*positional: object, cu_seq_lens_q: Tensor | None = None, **named: object) -> object:
        return forward(*positional, **named)

    monkeypatch.setattr(layer, "forward", drop)
    models.verify(model)


def test_an_architecture_that_needs_another_mask_is_refused(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = model.base_model.forward

    def forward(attention_mask: Tensor, **named: object) -> object:
        _rows, _tokens = attention_mask.shape
        return honest(attention_mask=attention_mask, **named)

    monkeypatch.setattr(model.base_model, "forward", forward)
    with pytest.raises(ModelError, match="does not support packed documents") as error:
        models.verify(model)
    assert "too many values" in str(error.value.why)


def test_only_failures_of_the_model_itself_become_errors_about_its_settings(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = model.base_model.forward

    def forward(**named: object) -> object:
        if "cu_seq_lens_q" in named:
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return honest(**named)

    monkeypatch.setattr(model.base_model, "forward", forward)
    with pytest.raises(RuntimeError):
        models.verify(model)
    monkeypatch.setattr(model.base_model, "forward", lambda **named: forward(cu_seq_lens_q=None))
    with pytest.raises(ModelError, match="cannot compute with these settings") as error:
        models.verify(model)
    assert "expected scalar type" in str(error.value.why)


def test_a_damaged_weight_is_named(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight contains NaN"):
        models.verify(model)


def test_overflow_is_distinguished_from_damaged_weights(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def overflowing(**arguments: Tensor) -> object:
        output = forward(**arguments)
        output.logits = output.logits * float("inf")
        return output

    monkeypatch.setattr(model, "forward", overflowing)
    with pytest.raises(ModelError, match="all its weights are finite"):
        models.verify(model)


def test_the_window_comes_from_the_layer_or_the_config() -> None:
    states = torch.randn(1, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    layer = nn.Module()

    def attend(window: int | None = None) -> Tensor:
        return attention.attend(layer, states, states, states, None, cu_seq_lens_q=bounds, sliding_window=window)[0]

    whole, narrow = attend(), attend(window=3)
    layer.layer_idx = 1
    for kind, expected in (("sliding_attention", narrow), ("full_attention", whole)):
        layer.config = SimpleNamespace(sliding_window=3, layer_types=["full_attention", kind])
        assert torch.equal(attend(), expected)
    layer.config = SimpleNamespace(sliding_window=9, max_position_embeddings=9)
    assert torch.equal(attend(), whole)
    layer.config = SimpleNamespace(sliding_window=3, max_position_embeddings=9)
    with pytest.raises(ModelError, match="sliding window of 3 tokens but does not say"):
        attend()
    assert torch.equal(attend(window=3), narrow)


def test_attention_sinks_of_gpt_oss_equal_those_of_transformers() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "num_local_experts": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = GptOssConfig(**sizes, **heads, num_experts_per_tok=1, rope_parameters=rope)
    config._attn_implementation = attention.IMPLEMENTATION
    torch.manual_seed(0)
    ours = GptOssForCausalLM(config).float().eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    config = GptOssConfig(**config.to_dict())
    config._attn_implementation = "eager"
    theirs = GptOssForCausalLM(config).float().eval()
    theirs.load_state_dict(ours.state_dict())
    models.verify(ours)
    ids, lengths = torch.randint(99, (1, 40)), (25, 15)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    hidden = forward_packed(ours, ids, positions, torch.tensor([0, 25, 40], dtype=torch.int32))
    parts = [theirs.model(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, 1)]
    torch.testing.assert_close(hidden, torch.cat(parts, 1))


def test_a_head_that_is_not_linear_is_refused(model: PreTrainedModel) -> None:
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(ModelError, match="output head"):
        models.head(model)


def test_layers_are_found(model: PreTrainedModel) -> None:
    assert models.decoder_layers(model) is model.model.layers


def test_the_device_is_known_without_decoding_the_head(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quant.quantize_ends(model, lambda name, rows, columns: Int8())
    monkeypatch.setattr(quant.QuantLinear, "decode", None)
    assert models.device_of(model) == torch.device("cpu")
