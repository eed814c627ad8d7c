"""Positions and windows depend on the length of each text alone: packed, batched and during generation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ingle import models
from ingle.config import ModelConfig
from ingle.errors import ModelError
from ingle.models.forward import attention
from ingle.models.loading import meta_device
from tests.contract.models.conftest import _GROUPED, VOCAB_SIZE, randomized
from tests.contract.models.test_architectures import pack, supervised_loss

#: The length at which the models below change.
SWITCH = 12
_HALF = 8  # half the size of a head
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * index for index in range(_HALF)],
    "long_factor": [2.0 + index for index in range(_HALF)],
    "original_max_position_embeddings": SWITCH,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 8.0}
_SCALED: dict[str, dict[str, object]] = {
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SWITCH},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": SWITCH,
    },
    "proportional": {},
    "dynamic": _DYNAMIC,
    "longrope": _LONGROPE,
}

CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "phi3": lambda: hf.Phi3Config(
        **_GROUPED, rope_parameters=_LONGROPE, original_max_position_embeddings=SWITCH, sliding_window=20
    ),
    "phimoe": lambda: hf.PhimoeConfig(
        **_GROUPED,
        num_local_experts=2,
        rope_parameters={**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
        original_max_position_embeddings=SWITCH,
        attention_bias=True,
        lm_head_bias=True,
    ),
    # A probe has only as many layers as there are kinds.
    "mistral-deep": lambda: hf.MistralConfig(**{**_GROUPED, "num_hidden_layers": 4}, sliding_window=5),
    "llama-dynamic": lambda: hf.LlamaConfig(
        **{**_GROUPED, "max_position_embeddings": SWITCH}, rope_parameters=_DYNAMIC
    ),
    "gemma3-by-layer": lambda: hf.Gemma3TextConfig(
        **{**_GROUPED, "max_position_embeddings": SWITCH},
        head_dim=16,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": _DYNAMIC,
        },
    ),
    **{
        f"llama-{kind}": lambda settings=settings, kind=kind: hf.LlamaConfig(
            **_GROUPED, rope_parameters={"rope_theta": 10_000.0, "rope_type": kind, **settings}
        )
        for kind, settings in _SCALED.items()
        if kind != "dynamic"
    },
    # Attention of its own: its mask is no wider than the longest text, and the packed row below is wider.
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        window_size=6,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


@pytest.fixture
def mixed() -> list[list[int]]:
    """Documents on both sides of the switch, at it, and two of different lengths beyond it."""
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 23, 1, 14, SWITCH, SWITCH + 1, 5)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def made(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and transformers' own."""
    folder = tmp_path_factory.mktemp("model")
    randomized(CONFIGS[name]()).save_pretrained(folder)
    ours = models.load_model(ModelConfig(id=str(folder), dtype="float32"))
    return ours, hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def test_every_rope_type_is_tested() -> None:
    assert set(_SCALED) == set(ROPE_INIT_FUNCTIONS)


def test_packed_documents_get_the_gradient_of_single_ones_in_transformers(made, mixed) -> None:
    ours, reference = made
    batch = pack(mixed)
    loss = supervised_loss(ours.requires_grad_(True), batch)
    loss.backward()
    gradients = {name: torch.zeros_like(parameter) for name, parameter in reference.named_parameters()}
    total = 0.0
    for document in mixed:
        alone = copy.deepcopy(reference)  # dynamic positions keep state
        ids = torch.tensor([document])
        if len(document) > 1:
            share = (len(document) - 1) / batch.num_supervised
            theirs = alone(input_ids=ids, labels=ids).loss * share
            theirs.backward()
            total += theirs.item()
            for name, parameter in alone.named_parameters():
                if parameter.grad is not None:
                    gradients[name] += parameter.grad
    assert loss.item() == pytest.approx(total, rel=1e-5)
    for name, parameter in ours.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-12)
        assert error < 1e-5, name


@pytest.mark.parametrize("name", ["phi3", "phimoe", "llama-dynamic", "gemma3-by-layer"], indirect=True)
def test_answers_that_grow_past_the_switch_are_those_of_transformers(made, mixed, tokenizer) -> None:
    ours, reference = made
    ours.generation_config.eos_token_id = ours.config.eos_token_id = tokenizer.eos_token_id
    answers = models.generate(ours, tokenizer, mixed, max_new_tokens=8, batch_size=4)
    for document, answer in zip(mixed, answers, strict=True):
        prompt = torch.tensor([document])
        ids = (
            copy.deepcopy(reference)
            .generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=2
            )[0, len(document) :]
            .tolist()
        )
        assert list(answer.token_ids) == (ids[: ids.index(2)] if 2 in ids else ids), len(document)


@pytest.mark.parametrize("name", ["phi3", "llama-dynamic", "gemma3-by-layer"], indirect=True)
def test_positions_chosen_by_the_longest_document_are_detected(made, monkeypatch) -> None:
    ours, _ = made
    monkeypatch.setattr(meta_device, "rotate_by_document", lambda model: None)
    with pytest.raises(ModelError, match="different results for packed documents") as error:
        models.verify(ours)
    assert f"max_position_embeddings of {SWITCH}" in str(error.value.why)


@pytest.mark.parametrize("name", ["phi3", "gemma3-by-layer"], indirect=True)
def test_a_lost_window_is_detected(made, monkeypatch) -> None:
    """Both windows are wider than the documents that went through the full model."""
    ours, _ = made
    monkeypatch.setattr(attention, "_window", lambda module, passed: None)
    with pytest.raises(ModelError, match="different results for packed documents") as error:
        models.verify(ours)
    assert "sliding_window" in str(error.value.why)
