"""The data of the examples with labels: what the script writes, and fair to whoever learns from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from ingle.config import DataConfig
from ingle.config.objective import Answer, Classify, ObjectiveConfig, Tag
from ingle.data.corruption import mask_token
from ingle.data.inspection import inspect
from ingle.data.sources import read_examples
from ingle.data.types import Example
from ingle.data.types import Span as Place

FILES = [
    f"{kind}/{split}{'.conll' if kind == 'tag' else '.jsonl'}"
    for kind in ("classify", "tag", "answer")
    for split in ("train", "heldout")
]
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "classify": Classify(kind="classify"),
    "tag": Tag(kind="tag", stride=32),
    "answer": Answer(kind="answer", stride=64),
}


def read(examples: Path, kind: str, split: str) -> list[Example]:
    source = {"path": str(examples / next(f for f in FILES if f.startswith(f"{kind}/{split}")))}
    return list(read_examples(DataConfig(sources=[source]).sources, objective=OBJECTIVES[kind].kind))


def test_committed_files_are_what_the_script_writes(
    labelled_script: ModuleType, examples: Path, tmp_path: Path
) -> None:
    labelled_script.main(["--output", str(tmp_path)])
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (examples / name).read_bytes(), (
            f"run make_labelled.py: {name} is stale"
        )


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_training_finds_nothing_wrong_with_the_rows(examples: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(examples / "models/ember-encoder")
    path = str(examples / next(f for f in FILES if f.startswith(f"{kind}/train")))
    report = inspect(DataConfig(sources=[path], max_seq_len=256), tokenizer, OBJECTIVES[kind])
    assert not report.stats.dropped and not report.stats.remarks and not report.stats.truncated_documents
    heldout = {example.text or example.texts["context"].text for example in read(examples, kind, "heldout")}
    assert not heldout & {example.text or example.texts["context"].text for example in read(examples, kind, "train")}


def test_no_word_but_praise_and_blame_tells_the_class(examples: Path, labelled_script: ModuleType) -> None:
    """Each frame occurs in both classes, and a count of good and bad words is right less often than a reader."""
    phrases = (examples / "classify/phrases.txt").read_text(encoding="utf-8")
    good, bad = (
        {line.removeprefix("* ") for line in phrases.split(f"== {name}\n")[1].split("\n== ")[0].splitlines()}
        for name in ("good", "bad")
    )
    right = 0
    rows = read(examples, "classify", "heldout")
    for row in rows:
        assert row.text is not None
        score = sum((word in good) - (word in bad) for word in row.text.split())
        right += (score > 0) == (row.label == "positive") if score else 0
    assert Counter(row.label for row in rows)["positive"] == pytest.approx(len(rows) / 2, rel=0.15)
    assert right / len(rows) < 0.5


def test_names_alone_do_not_tell_the_tag(examples: Path) -> None:
    tags = {}
    for row in read(examples, "tag", "train"):
        assert isinstance(row.label, tuple) and row.text is not None
        for word, tag in zip(row.text.split(), row.label, strict=True):
            tags.setdefault(word, set()).add(str(tag).partition("-")[2])
    assert {"PER", "LOC", "ORG"} <= tags["Milton"] and {"PER", "LOC"} <= tags["Florence"]


def test_answers_are_places_and_some_questions_have_none(examples: Path) -> None:
    for split in ("train", "heldout"):
        rows = read(examples, "answer", split)
        for row in rows:
            for place, text in zip(row.label or (), row.references, strict=True):
                assert isinstance(place, Place)
                assert (row.texts["context"].text or "")[place.start : place.end] == text
        assert 0.1 < sum(not row.label for row in rows) / len(rows) < 0.3


def test_bases_have_the_tokens_of_their_objectives(examples: Path) -> None:
    text = "Half past three in the afternoon, the river rose over the bridge."
    encoder, pair = (
        AutoTokenizer.from_pretrained(examples / "models" / name) for name in ("ember-encoder", "ember-encoder-decoder")
    )
    for tokenizer in (encoder, pair):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert encoder.decode(encoder("a", "b")["input_ids"]) == "[CLS]a[SEP]b[SEP]"
    assert "token_type_ids" not in encoder("a", "b")
    assert mask_token(encoder) == encoder.convert_tokens_to_ids("[MASK]")
    assert mask_token(pair) == pair.convert_tokens_to_ids("<mask>")
    assert pair.convert_ids_to_tokens(pair("over <mask> in")["input_ids"]).count("<mask>") == 1
    assert pair.decode(pair(text_target="a")["input_ids"]) == f"a{pair.eos_token}"
