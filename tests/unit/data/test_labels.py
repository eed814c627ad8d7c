"""Rows with several texts and rows with labels: read, tokenized, stored, and packed as units."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from ingle.config.data import DataConfig
from ingle.data import build_dataset, make_sequences
from ingle.data.encoding import TextEncoder, make_document
from ingle.data.labels import parse_labelled
from ingle.data.layouts import parse_row
from ingle.data.types import IGNORE_INDEX, Example, Span
from ingle.errors import ConfigError, DataError


def parse_preference(row, origin):
    return parse_row(row, "preference", origin)


def config(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig.model_validate({"sources": [str(path)], **options})


def pairs(path, tokenizer, rows, **options):
    data = config(path, rows, **options)
    return data, build_dataset(data, tokenizer, objective="sft", parse=parse_preference)


def test_a_row_is_kept_or_dropped_with_all_its_texts(tmp_path, tokenizer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in ("c", " ", "word " * 60)]
    data, dataset = pairs(tmp_path / "a.jsonl", tokenizer, rows, max_seq_len=48, too_long="drop")
    assert [dataset.origin(i)[-2:] for i in range(len(dataset))] == [":1", ":1"]
    assert [(r.reason, r.count) for r in dataset.stats.dropped] == [
        ("Empty answer.", 1),
        ("Longer than data.max_seq_len = 48.", 1),
    ]
    assert (dataset.stats.rows, dataset.stats.documents) == (3, 2)
    with pytest.raises(ConfigError, match="can be split"):
        build_dataset(data.model_copy(update={"too_long": "split"}), tokenizer, objective="clm", parse=parse_preference)


@pytest.mark.parametrize("packing", [True, False])
def test_packing_moves_rows_as_units(tmp_path, tokenizer, packing):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (40, 2))
    rows = [{"prompt": "a", "chosen": "yes " * n, "rejected": "no " * m} for n, m in lengths.tolist()]
    data, dataset = pairs(tmp_path / "a.jsonl", tokenizer, rows, max_seq_len=64, packing=packing)
    sequences = make_sequences(dataset, data, 0)
    assert sorted(np.concatenate(list(sequences)).tolist()) == list(range(80))
    assert (len(sequences) < 40) is packing
    for sequence in sequences:
        groups = [int(dataset.sample(int(i)).columns["group_ids"].item()) for i in sequence]
        assert groups[::2] == groups[1::2] and sequence.tolist() == sorted(sequence.tolist())
        assert dataset.lengths[sequence].sum() <= 64


def test_a_row_longer_than_a_sequence_makes_a_longer_one(tmp_path, tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "x " * 30, "rejected": "y " * 30},
    ]
    data, dataset = pairs(tmp_path / "a.jsonl", tokenizer, rows, max_seq_len=64)
    assert dataset.lengths.max() <= 64 < dataset.lengths[2:].sum()
    assert sorted(sequence.tolist() for sequence in make_sequences(dataset, data, 0))[-1][-2:] == [2, 3]


def test_several_answers_with_scores(tmp_path, tokenizer):
    def parse(row, origin):
        answers = enumerate(zip(row["answers"], row["scores"], strict=True))
        return Example(
            origin,
            texts={
                f"answer-{i}": Example(origin, prompt="a", completion=text, labels={"document_labels": score})
                for i, (text, score) in answers
            },
        )

    rows = [{"answers": ["b", "c", "d"], "scores": [0.5, -1, 2]}, {"answers": ["e", "f"], "scores": [3, 4]}]
    dataset = build_dataset(config(tmp_path / "a.jsonl", rows), tokenizer, objective="sft", parse=parse)
    columns = [dataset.sample(i).columns for i in range(5)]
    assert [column["document_labels"].item() for column in columns] == [0.5, -1, 2, 3, 4]
    assert [column["group_ids"].item() for column in columns] == [0, 0, 0, 1, 1]
    assert dataset.text_name(4) == "answer-1"


def test_classes_become_document_labels(tmp_path, tokenizer):
    rows = [{"text": "good", "label": "pos"}, {"text": "x " * 99, "label": "neg"}, {"text": "!", "label": 1}]
    data = config(tmp_path / "a.jsonl", rows, max_seq_len=32, too_long="truncate")
    parse = parse_labelled(classes=("neg", "pos"))
    dataset = build_dataset(data, tokenizer, objective="clm", parse=parse)
    assert [dataset.sample(i).columns["document_labels"].item() for i in range(3)] == [1, 0, 1]
    assert dataset.groups is None and dataset.stats.truncated_documents == 1
    for row, why in (({"text": "a", "label": "bad"}, "one of neg, pos"), ({"text": "a"}, "'label' is None")):
        with pytest.raises(DataError, match="label is malformed") as caught:
            parse(row, "f:1")
        assert why in str(caught.value.why)


def test_spans_label_the_tokens_that_overlap_them(tokenizer):
    text = "the quick brown fox jumps over the lazy dog"
    spans = tuple(Span(text.index(word), text.index(word) + len(word), i) for i, word in enumerate(("quick", "lazy")))
    example = Example("f:1", text=text, labels={"token_labels": spans})
    document = make_document(example, tokenizer, train_on="all", system=None)
    (encoded,) = TextEncoder(tokenizer).encode([document])
    labels = encoded.token_labels["token_labels"]
    assert len(labels) == len(encoded.ids) and labels[-1] == IGNORE_INDEX
    for i, word in enumerate(("quick", "lazy")):
        assert tokenizer.decode(encoded.ids[labels == i]).strip() == word
    plain = make_document(Example("f:1", text=text), tokenizer, train_on="all", system=None)
    assert encoded.ids.tolist() == next(TextEncoder(tokenizer).encode([plain])).ids.tolist()


def test_labels_of_tokens_follow_the_pieces_of_a_split_text(tmp_path, tokenizer):
    text = "one two three four five six seven " * 6

    def parse(row, origin):
        spans = tuple(Span(i, i + 3, i) for i in range(len(text)) if text.startswith("six", i))
        return Example(origin, text=row["text"], labels={"token_labels": spans})

    data = config(tmp_path / "a.jsonl", [{"text": text}], max_seq_len=16)
    dataset = build_dataset(data, tokenizer, objective="clm", parse=parse)
    samples = [dataset.sample(i) for i in range(len(dataset))]
    assert len(samples) > 3 and all(len(s.columns["token_labels"]) == len(s.input_ids) for s in samples)
    found = [np.unique(s.columns["token_labels"]) for s in samples]
    assert {int(i) for each in found for i in each} == {i for i in range(len(text)) if text.startswith("six", i)} | {
        IGNORE_INDEX
    }


def test_the_fingerprint_covers_rows_and_labels_and_nothing_else_without_them(tmp_path, tokenizer):
    data = config(tmp_path / "a.jsonl", [{"text": "one two", "label": 0}, {"text": "three", "label": 1}])
    plain = build_dataset(data, tokenizer, objective="clm")
    assert plain.sample(0).columns == {}
    ids = np.concatenate([plain.sample(i).input_ids for i in range(2)])
    supervised = np.concatenate([plain.sample(i).labels != IGNORE_INDEX for i in range(2)])
    offsets = np.array([0, *np.cumsum(plain.lengths)])
    expected = hashlib.sha256(offsets.tobytes() + ids.tobytes() + supervised.tobytes()).hexdigest()
    assert plain.fingerprint() == expected
    prints = {expected}
    for labels in (0, 1), (1, 1):
        rows = [{"text": text, "label": label} for text, label in zip(("one two", "three"), labels, strict=True)]
        labelled = config(tmp_path / "b.jsonl", rows)
        prints.add(build_dataset(labelled, tokenizer, objective="clm", parse=parse_labelled()).fingerprint())
    assert len(prints) == 3


def test_every_row_that_is_read_is_shown_to_the_caller(tmp_path, tokenizer):
    seen = []
    data = config(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}, {"text": "three"}])
    build_dataset(data, tokenizer, objective="clm", on_example=seen.append)
    assert [example.text for example in seen] == ["one", " ", "three"]
