"""Packed documents get the losses and adapter gradients of single ones in transformers, whatever mixes their tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from ingle import models
from ingle.config import NoBase
from ingle.config.objective import TRAINS
from ingle.data.types import IGNORE_INDEX
from ingle.errors import ModelError, QuantizationError
from ingle.models.text_part import text_config
from tests.contract.models.any_model import (
    FolderOf,
    cases,
    load,
    random_documents,
    require_independent_documents,
    require_listed_layout,
    require_same_losses_and_gradients,
    writer,
)
from tests.contract.models.tiny_types import CAUSAL_TYPES, small_config
from tests.tiny_tokenizers import bert

#: About a tenth of all: one of every way to mix tokens, by itself and with others.
SOME = (
    "bloom",
    "bigbird_pegasus",
    "deepseek_v32",
    "emu3",
    "falcon_h1",
    "gpt_oss",
    "gptj",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "llama4_text",
    "mamba",
    "mamba2",
    "mpt",
    "nemotron",
    "qwen3_5_text",
    "recurrent_gemma",
    "roberta",
    "rwkv",
    "whisper",
)
#: Why a type cannot be tried here, or is refused.
REASONS = {
    "cpmant": "its tokens see later tokens",
    "prophetnet": "several tokens ahead",
    "reformer": "must fill all its positions",
    "xlm": "it is an encoder",
    "xlnet": "its tokens see later tokens",
}
#: Types whose stacked weights have a layout that cannot be quantized.
STACKED = ("dbrx",)
#: Why there is no small model of a type.
NOT_BUILT = {
    **dict.fromkeys(("dots3_note", "dots3_note_text"), "the sizes of the default config do not shrink"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "AutoModelForCausalLM cannot build it; it reads music codes"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "it drafts tokens for another model"),
    "gemma3n": "its image tower needs timm; test_wrappers.py has a test",
}
#: Largest relative errors of gradients. Where it is not 1e-4, the float32 gradients of transformers differ as much from
#: its float64 gradients: the delta rule normalizes short vectors.
ROUNDING = {"bailing_hybrid": 5e-4, "qwen3_5_moe": 3e-4, "qwen3_5_moe_text": 3e-4, "qwen3_next": 3e-4}
LENGTHS = (7, 30, 3, 18, 11)
NUM_NEW_TOKENS = 6
#: Types of :data:`SOME` that are quantized, too.
QUANTIZED = ("gpt_oss", "jamba", "llama4_text", "rwkv")
CASES = cases(CAUSAL_TYPES, SOME, QUANTIZED)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    return writer(tmp_path_factory, AutoModelForCausalLM, small_config, NOT_BUILT)


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return random_documents(LENGTHS)


def next_tokens(ids: list[int]) -> list[int]:
    return [*ids[1:], IGNORE_INDEX]


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_documents_are_computed_as_single_ones(kind, base, folder_of, documents) -> None:
    folder = folder_of(kind)
    if kind in REASONS:
        with pytest.raises(ModelError, match=REASONS[kind]):
            models.require_kind(load(folder, base).config, TRAINS["clm"], "clm")
        return
    if kind in STACKED and base.format != "none":
        with pytest.raises(QuantizationError, match="in a layout that cannot be quantized yet"):
            load(folder, base)
        return
    model = load(folder, base)
    require_listed_layout(model)
    if base.format == "none":
        require_independent_documents(model, documents, next_tokens)
    reader = getattr(transformers, models.class_that_reads(model))
    reference = reader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rounding = ROUNDING.get(kind, 1e-4)
    require_same_losses_and_gradients(model, reference, documents, next_tokens, rounding=rounding)


#: Types with keys, states, both or nothing in their cache: ``Layout.caches`` and ``Layout.pads_from`` of each.
GROWING = {
    "bert": (True, 0),
    "blenderbot-small": (True, None),
    "mamba": (True, 0),
    "qwen3_5_text": (True, 0),
    "rwkv": (False, 0),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=() if each in GROWING else pytest.mark.sweep) for each in CAUSAL_TYPES]
)
def test_texts_of_a_batch_grow_as_single_ones(kind, folder_of) -> None:
    if kind in REASONS:
        pytest.skip(REASONS[kind])
    folder = folder_of(kind)
    model = load(folder, NoBase())
    if kind in GROWING:
        assert (model.packed_layout.caches, model.packed_layout.pads_from) == GROWING[kind]
    reader = getattr(transformers, models.class_that_reads(model))
    reference = reader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = random_documents((3, 14, 5, 9))
    expected = [greedy(reference, prompt) for prompt in prompts]
    end = expected[1][2]  # at least one text ends earlier than the others
    text_config(model.config).eos_token_id = None
    model.generation_config.eos_token_id = end
    answers = models.generate(model, bert(), prompts, max_new_tokens=NUM_NEW_TOKENS)
    for answer, tokens in zip(answers, expected, strict=True):
        assert list(answer.token_ids) == (tokens[: tokens.index(end)] if end in tokens else tokens)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Continues a prompt by computing the whole text again for each token."""
    ids = torch.tensor([prompt])
    for _ in range(NUM_NEW_TOKENS):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()
