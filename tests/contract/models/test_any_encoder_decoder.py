"""Packed pairs of documents get the losses and adapter gradients of single pairs in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

from ingle.data.types import IGNORE_INDEX
from ingle.errors import ModelError
from tests.contract.models.any_model import (
    FolderOf,
    Reads,
    Targets,
    cases,
    load,
    random_documents,
    require_independent_documents,
    require_listed_layout,
    require_same_losses_and_gradients,
    writer,
)
from tests.contract.models.tiny_types import ENCODER_DECODER_TYPES, small_encoder_decoder_config

#: One of every way to number positions, to mix tokens and to head them.
SOME = ("bart", "led", "m2m_100", "t5", "t5gemma")
#: Why a type is refused.
REFUSED = {
    "prophetnet": "several tokens ahead",
    "voxtral_realtime": "no text without sound",
}
#: Types that read sound; of a text, their causal model is trained.
WITH_SOUND = tuple(kind for kind in ENCODER_DECODER_TYPES if not CONFIG_MAPPING[kind].is_encoder_decoder)
LENGTHS = (7, 30, 3, 18, 11)
#: Types of :data:`SOME` that are quantized, too.
QUANTIZED = ("t5",)
CASES = cases(ENCODER_DECODER_TYPES, SOME, QUANTIZED)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    return writer(tmp_path_factory, AutoModelForSeq2SeqLM, small_encoder_decoder_config, {})


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return random_documents(LENGTHS)


def target(source: list[int]) -> list[int]:
    """A text of another length; the order of the lengths is another, too."""
    return [(3 * token + 7) % 90 + 3 for token in source[: 37 % (len(source) + 4) + 1]]


def next_tokens(ids: list[int]) -> list[int]:
    return [*ids[1:], IGNORE_INDEX]


def reading_of(kind: str) -> tuple[Targets, Reads]:
    """What a model predicts and its decoder reads; models of sound are causal models of text."""
    return (target, decoder_input) if kind not in WITH_SOUND else (next_tokens, None)


def decoder_input(source: list[int]) -> list[int]:
    return [2, *target(source)[:-1]]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # a router converts weights that are results here
@pytest.mark.parametrize(("kind", "base"), CASES)
def test_pairs_are_computed_as_single_ones(kind, base, folder_of, documents) -> None:
    folder = folder_of(kind)
    if kind in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[kind]):
            load(folder, base)
        return
    model = load(folder, base)
    require_listed_layout(model)
    if base.format == "none":
        require_independent_documents(model, documents, *reading_of(kind))
    reference = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    require_same_losses_and_gradients(model, reference, documents, *reading_of(kind))
