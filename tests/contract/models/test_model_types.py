"""The table of model types says what the installed transformers shows."""

from __future__ import annotations

import pytest
import transformers

from ingle.models.survey import known_types
from ingle.planning.model_types import model_table
from tests.contract.models.model_survey import survey_type

SOME = (
    *(("bloom", "causal"), ("dbrx", "causal"), ("gpt_oss", "causal"), ("llama", "causal"), ("mamba", "causal")),
    *(
        ("roberta", "causal"),
        ("roberta", "encoder"),
        ("xlnet", "causal"),
        ("musicgen", "causal"),
        ("t5", "encoder_decoder"),
    ),
)
TYPES = [
    *SOME,
    *(pytest.param(*each, marks=pytest.mark.sweep) for each in known_types() if each not in SOME),
]

pytestmark = pytest.mark.skipif(
    model_table().transformers != transformers.__version__, reason="the table is that of another transformers"
)


def test_every_type_is_listed_once() -> None:
    assert [(each.name, each.kind) for each in model_table().types] == known_types()


@pytest.mark.parametrize(("name", "kind"), TYPES)
def test_the_table_says_what_a_tiny_copy_shows(name, kind) -> None:
    assert [survey_type(name, kind)] == model_table().find(name, kind)
