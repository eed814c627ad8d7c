"""Passes over stored keys give the hidden states of complete texts, for every architecture that has such passes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ingle import adapters, models
from ingle.config import Nf4Base, NoBase
from ingle.kernels.attention import cached
from ingle.models import Request, Sampling
from ingle.models.forward.encoder_decoder import Row
from ingle.models.forward.hidden_states import forward_packed, why_nothing_is_stored
from ingle.models.generation.passes import Passes, try_passes
from ingle.models.generation.rollout import GrowingRollout
from ingle.models.generation.slots import Slots
from ingle.models.generation.stop_criteria import StopCriteria
from tests.contract.models.any_model import FolderOf, attach, load, writer
from tests.contract.models.tiny_types import CAUSAL_TYPES, small_config

#: Types with windows and softcaps, sinks, chunks, latent attention and experts; and those that keep more than keys.
STORED = ("gemma2", "gpt_oss", "llama4_text", "deepseek_v3")
NOT_STORED = ("bloom", "mamba2")
NOTHING = StopCriteria(None, (), frozenset())  # type: ignore[arg-type]
#: Longer than the windows and chunks of the small configs.
PROMPTS = [[(7 * place + number) % 60 + 3 for place in range(length)] for number, length in enumerate((23, 1, 9))]
ANSWER = [(5 * place) % 60 + 3 for place in range(14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    return writer(tmp_path_factory, AutoModelForCausalLM, small_config, {})


def require_right(model: PreTrainedModel, tolerance: float = 2e-4) -> None:
    """Two answers to each prompt grow in slots; their hidden states are those of the complete texts."""
    texts = [Request(0, number, PROMPTS[number % 3], len(ANSWER), ANSWER) for number in range(6)]
    slots = Slots(texts, lambda request: GrowingRollout(request, NOTHING, None), 8, 10)
    passes = Passes(model, slots, 40)
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    slots.enter()
    while len(slots.growing) < len(texts):
        passes.hidden(slots.prompt_pass())
        slots.enter()
    for token in ANSWER:
        for each, state in zip(found, passes.hidden(slots.token_pass(range(6), 8)), strict=False):
            each.append(state)
        for growing in slots.growing.values():
            growing.add(token, 0.0, 0.0)
    row = Row.of([torch.tensor([*text.prompt, *ANSWER[:-1]]) for text in texts])
    wanted_NH = forward_packed(model, row.ids, row.position_ids, row.cu_seqlens)[0]
    for states, end in zip(found, row.cu_seqlens[1:].tolist(), strict=True):
        expected = wanted_NH[end - len(ANSWER) : end]
        assert (torch.stack(states) - expected).norm() <= tolerance * expected.norm()


OTHERS = [pytest.param(kind, marks=pytest.mark.sweep) for kind in CAUSAL_TYPES if kind not in STORED]


@pytest.mark.parametrize("kind", [*STORED, *OTHERS])
@torch.no_grad()
def test_a_type(kind: str, folder: FolderOf) -> None:
    try:
        model = load(folder(kind), NoBase())
    except (models.ModelError, ValueError) as error:
        assert kind not in STORED
        pytest.skip(f"{type(error).__name__}: not loaded")
    if (why := why_nothing_is_stored(model)) is not None:
        assert kind not in STORED
        pytest.skip(why)
    attach(model)
    model.eval()
    require_right(model)
    found = try_passes(model, Sampling(num_slots=16, prefill_tokens=16), NOTHING)
    assert found.is_right and found.is_invariant and found.sizes[-1] == 16


@pytest.mark.parametrize("kind", NOT_STORED)
def test_a_type_that_keeps_more_than_keys(kind: str, folder: FolderOf) -> None:
    assert why_nothing_is_stored(load(folder(kind), NoBase())) is not None


def fused_cases() -> list[Any]:
    """Every fused type over a plain and a quantized base, prepared or not; most are a sweep."""
    some = [("mistral", "none", 1 << 28), ("qwen3", "nf4", 1 << 28), ("qwen3", "nf4", 0)]
    cases = itertools.product(("llama", "mistral", "qwen2", "qwen3"), ("none", "nf4"), (0, 1 << 28))
    return [pytest.param(*case, marks=() if case in some else pytest.mark.sweep) for case in cases]


@pytest.mark.parametrize(("kind", "base_format", "room"), fused_cases())
@torch.no_grad()
def test_fused_layers(
    kind: str, base_format: str, room: int, folder: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "PREPARED_BYTES", room)
    model = load(folder(kind), Nf4Base(format="nf4") if base_format == "nf4" else NoBase())
    attach(model)
    assert adapters.fuse(model).fused == model.config.num_hidden_layers
    model.eval()
    require_right(model)
    assert try_passes(model, Sampling(num_slots=16, prefill_tokens=16), NOTHING).is_invariant
