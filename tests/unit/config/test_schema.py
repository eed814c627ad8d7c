from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from ingle.config import DataConfig, LoraAdapter, Nf4Base, Run
from ingle.config.document import read_value
from ingle.config.loader import leaves, load_run
from ingle.config.schema import describe_type, docstring, json_schema, options


def test_every_option_is_described_and_has_a_type() -> None:
    for option in options():
        assert option.description, option.path
        assert option.type, option.path


def test_options_are_those_of_the_tree() -> None:
    flags = ["--model.id=m", "--data.sources=a", "--output=o", "--evaluate.sources=e", "--base=nf4"]
    run = load_run(None, flags).run
    written = {
        ".".join("N" if key.isdigit() else key for key in path) for path, _ in leaves(run.model_dump(mode="json"))
    }
    listed = {option.path for option in options() if option.when in (None, "base.format = nf4", "adapter.kind = lora")}
    inside = {"adapter.merge_aware.format", "adapter.merge_aware.fraction"}
    inside |= {
        path for path in listed if path.startswith(("data.validation.", "train.early_stopping.", "evaluate.rewards."))
    }  # null
    assert listed - written == {"evaluate", "data.sources", "evaluate.sources"} | inside
    assert written <= listed


def test_defaults_read_back_as_the_defaults() -> None:
    by_path = {option.path: option for option in options()}
    assert by_path["model.id"].default is None and by_path["output"].default is None
    assert by_path["optim.lr"].default == "null"
    assert read_value(by_path["optim.eps"].default or "", "").plain() == 1e-8
    assert read_value(by_path["optim.betas"].default or "", "").plain() == [0.9, 0.999]
    assert by_path["adapter.kind"].default == "lora"
    assert by_path["base.bits"].when == "base.format = hqq"
    assert by_path["evaluate"].default == "null"


def test_docstrings_are_joined_over_lines() -> None:
    summary, described = docstring(DataConfig)
    assert summary == "The training data."
    assert described["too_long"].startswith("How to handle a document longer than ``max_seq_len``: ``truncate``")
    assert described["too_long"].endswith("become overlapping windows.")
    assert described.keys() == DataConfig.model_fields.keys()
    assert docstring(LoraAdapter)[1].keys() == LoraAdapter.model_fields.keys() - {"kind"}


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (str, "text"),
        (str | None, "text or null"),
        (Literal["a"], "a"),
        (Literal["a", "b"] | bool, "a, b, true or false"),
        (Annotated[int, Field(ge=1)] | None, "an integer of at least 1 or null"),
        (Annotated[float, Field(gt=0, le=1)], "a number above 0 and at most 1"),
        (tuple[str, ...], "a list of text"),
        (tuple[float, float], "a list of 2, each a number"),
    ],
)
def test_types_in_plain_words(hint: Any, words: str) -> None:
    assert describe_type(hint) == words


def test_json_schema_describes_and_accepts_what_the_loader_accepts() -> None:
    schema = json_schema()
    assert schema["properties"]["seed"]["description"] == "Seed of data order, adapter initialization and dropout."
    nf4 = schema["$defs"]["Nf4Base"]
    assert nf4["description"] == docstring(Nf4Base)[0]
    assert nf4["properties"]["block_size"]["description"].startswith("Consecutive weights")
    assert "Attributes" not in str(schema)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {name for name, field in Run.model_fields.items() if field.is_required()}
