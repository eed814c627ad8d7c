"""Packed documents get the masked-token losses and adapter gradients of single ones in transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMaskedLM

from ingle.data.types import IGNORE_INDEX
from ingle.errors import ModelError
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
from tests.contract.models.tiny_types import ENCODER_TYPES, small_encoder_config

#: One of every way to mix tokens and to number positions.
SOME = ("bert", "deberta-v2", "esm", "modernbert", "mpnet", "roberta")
#: Why a type is refused.
REFUSED = {
    "mobilebert": "computes its logits without calling its output layer",
    "perceiver": "has no output layer",
    "reformer": "must fill all its positions",
}
#: The last is longer than the longest text of a model, so that the packed row is too.
LENGTHS = (7, 30, 3, 18, 11)
#: Types of :data:`SOME` that are quantized, too.
QUANTIZED = ("bert",)
CASES = cases(ENCODER_TYPES, SOME, QUANTIZED)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    return writer(tmp_path_factory, AutoModelForMaskedLM, small_encoder_config, {})


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return random_documents(LENGTHS)


def hidden_tokens(ids: list[int]) -> list[int]:
    """Other tokens at about a third of the positions, as if these were hidden in the text."""
    return [(5 * token + 1) % 100 + 3 if place % 3 == 1 else IGNORE_INDEX for place, token in enumerate(ids)]


@pytest.mark.parametrize(("kind", "base"), CASES)
def test_documents_are_computed_as_single_ones(kind, base, folder_of, documents) -> None:
    folder = folder_of(kind)
    if kind in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[kind]):
            load(folder, base)
        return
    model = load(folder, base)
    require_listed_layout(model)
    if base.format == "none":
        require_independent_documents(model, documents, hidden_tokens)
    reference = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    require_same_losses_and_gradients(model, reference, documents, hidden_tokens)
