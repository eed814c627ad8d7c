"""Packed documents get the losses and adapter gradients of single ones in transformers, whatever mixes their tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ingle import models
from ingle.config.objective import TRAINS
from ingle.data.types import IGNORE_INDEX
from ingle.errors import ModelError, QuantizationError
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
