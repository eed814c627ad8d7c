"""What ``ingle plan`` says about the layout of an architecture, and the table that it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ingle.cli.app import app
from ingle.config import Run
from ingle.errors import ModelError
from ingle.planning import model_types
from ingle.planning.layouts import describe_layout, layout_note
from ingle.planning.model_types import ModelType, model_table, write_table


@pytest.mark.parametrize(
    ("objective", "model_type", "said"),
    [
        ("sft", "llama", None),
        ("sft", "of another release", None),
        (
            "sft",
            "mamba2",
            "Mamba2Mixer of mamba2 sees them as the rows of batches, grouped by length, with at most 25%",
        ),
        ("seq2seq", "bart", None),  # only its positions are looked up by row
        ("mlm", "mpnet", "mpnet cannot be packed: each document is a row of its own"),
        ("classify", "fnet", "a call for each length"),
    ],
)
def test_the_plan_says_what_a_layout_costs(objective: str, model_type: str, said: str | None) -> None:
    run = Run.model_validate(
        {"model": {"id": "m"}, "data": {"sources": [{"path": "a"}]}, "output": "o", "objective": {"kind": objective}}
    )
    note = layout_note(run, model_type)
    assert note is None if said is None else note is not None and said in note


def test_a_layout_that_was_not_tried_says_why() -> None:
    note = describe_layout("odd", "packed", because="ValueError: sizes", tried=False)
    assert note is not None and "(ValueError: sizes)" in note
    assert describe_layout("plain", "packed") is None


def test_the_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (
        ModelType("a", "causal", layout="documents", dealt=("Mixer",), objectives=("sft",), exports=("gguf",)),
        ModelType("a", "encoder", quantizes=False, reason="why"),
    )
    monkeypatch.setattr(model_types, "TABLE", tmp_path / "table.json")
    write_table("5.9", reversed(entries))
    model_table.cache_clear()
    try:
        assert model_table().types == entries
        assert model_table().find("a", "encoder") == [entries[1]]
    finally:
        model_table.cache_clear()


def models(*words: str) -> str:
    result = CliRunner().invoke(app, ["models", *words], env={"COLUMNS": "160"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_models_are_listed_with_the_reasons_of_those_that_are_not_trained() -> None:
    everything = json.loads(models("--json"))
    assert {each["name"] for each in everything["types"]} > {"llama", "mamba2", "bert", "t5"}
    assert "its tokens see later tokens" in models("xlnet")
    (llama,) = json.loads(models("llama", "--json"))["types"]
    assert llama["layout"] == "packed" and {"clm", "sft"} <= set(llama["objectives"])
    assert "gguf" in llama["exports"]


def test_an_unknown_type_gets_the_nearest_one() -> None:
    with pytest.raises(ModelError, match="did you mean llama"):
        models("lama")
