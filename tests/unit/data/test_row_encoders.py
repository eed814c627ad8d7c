"""Rows of every objective with labels or two rows: tokens as transformers makes them, labels where they belong."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ingle import env
from ingle.config.data import DataConfig
from ingle.config.objective import Answer, Classify, Mlm, Seq2Seq, Span, Tag
from ingle.data import build_dataset, make_sequences
from ingle.data.corruption import denoisers, longest_text
from ingle.data.encode_tags import cut_windows, find_first_tokens
from ingle.data.label_names import name_labels
from ingle.data.row_encoder import Counts, token_options
from ingle.data.row_tokenizer import make_encoder
from ingle.data.sources import read_examples
from ingle.data.types import IGNORE_INDEX
from ingle.errors import ConfigError, DataError
from tests import tiny_tokenizers

TOKENIZERS = [tiny_tokenizers.bert(), tiny_tokenizers.roberta(), tiny_tokenizers.t5()]
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bert", "roberta", "t5"])

WORDS = ["the", "quick", "brown", "fox", "New", "York,", "lives;", "great", "film", "beauty", "naïve", "日本", "(dull)"]


def write(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig.model_validate({"sources": [str(path)], **options})


def build(data, tokenizer, objective, sink=None):
    return build_dataset(data, tokenizer, objective=name_labels(data, objective), sink=sink)


def ids_of(dataset):
    return [dataset.sample(i).input_ids.tolist() for i in range(len(dataset))]


def say(rng, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


@each_tokenizer
def test_pairs_are_cut_as_pipelines_cut_them(tmp_path, tokenizer):
    rng = random.Random(0)
    rows = [{"premise": say(rng, 12), "hypothesis": say(rng, 12), "label": i % 3} for i in range(60)]
    dataset = build(write(tmp_path / "a.jsonl", rows, max_seq_len=21), tokenizer, Classify(kind="classify"))
    for i, row in enumerate(rows):
        expected = tokenizer(row["premise"], row["hypothesis"], truncation="longest_first", max_length=21)
        sample = dataset.sample(i)
        assert sample.input_ids.tolist() == expected["input_ids"]
        if "token_type_ids" in tokenizer.model_input_names:
            assert sample.columns["token_type_ids"].tolist() == expected["token_type_ids"]
        assert sample.columns["document_labels"].tolist() == [i % 3]
    assert 0 < dataset.stats.truncated_documents < 60
    assert dataset.label_counts(3).tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("labels", "problem", "names", "columns"),
    [
        (["pos", "neg"], "single", ("neg", "pos"), [[1], [0]]),
        (["class 10", "class 9"], "single", ("class 9", "class 10"), [[1], [0]]),
        ([True, False], "single", ("false", "true"), [[1], [0]]),
        ([3, 1.0], "single", ("1", "3"), [[1], [0]]),
        ([0.5, 2], "regression", None, [[0.5], [2]]),
        ([["b", "a"], []], "multi", ("a", "b"), [[[1, 1]], [[0, 0]]]),
    ],
)
def test_labels_decide_on_names_and_problem(tmp_path, labels, problem, names, columns):
    rows = [{"text": "a film", "label": label} for label in labels]
    data = write(tmp_path / "a.jsonl", rows)
    found = name_labels(data, Classify(kind="classify"))
    assert (found.problem, found.labels) == (problem, names)
    dataset = build_dataset(data, TOKENIZERS[0], objective=found)
    assert [dataset.sample(i).columns["document_labels"].tolist() for i in range(2)] == columns


def test_given_names_are_kept_and_name_classes_that_are_counted_from_0(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"text": "good", "label": 1}, {"text": "dull", "label": "bad"}])
    named = Classify(kind="classify", labels=["bad", "good"])
    dataset = build(data, TOKENIZERS[0], named)
    assert [dataset.sample(i).columns["document_labels"].item() for i in range(2)] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "objective", "place", "message", "why"),
    [
        ([{"text": "a", "label": "x"}] * 2, Classify(kind="classify"), "a.jsonl", "fewer than two classes", "'x'"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], Classify(kind="classify"), ":2", "no label", ""),
        (
            [{"text": "a", "label": "good"}, {"text": "b", "label": "god"}],
            Classify(kind="classify", labels=["bad", "good"], problem="single"),
            ":2",
            "'god' is unknown",
            "bad, good",
        ),
        (
            [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}, {"tokens": ["a", "b"], "tags": ["O"]}],
            Tag(kind="tag"),
            ":2",
            "does not fit the layout tagged",
            "2 tokens have 1 tags",
        ),
        (
            [{"question": "a?", "context": "the fox", "answers": {"text": ["fox"], "answer_start": [3]}}],
            Answer(kind="answer"),
            ":1",
            "does not fit the layout squad",
            "it is at 4",
        ),
        ([{"alpha": 1}], Classify(kind="classify"), ":1", "columns do not fit the objective classify", "alpha"),
    ],
)
def test_errors_name_the_row(tmp_path, rows, objective, place, message, why):
    with pytest.raises(DataError, match=message) as caught:
        build(write(tmp_path / "a.jsonl", rows), TOKENIZERS[0], objective)
    assert caught.value.where.endswith(place) and why in (caught.value.why or "")


def brute_force_first(offsets, words):
    """The first token with a character of each word, unless an earlier word has it."""
    found, taken = [], set()
    for start, end in words:
        tokens = [t for t, (a, b) in enumerate(offsets) if any(a <= c < b for c in range(start, end))]
        first = tokens[0] if tokens and tokens[0] not in taken else -1
        taken.add(first)
        found.append(first)
    return found


def test_first_tokens_are_those_of_a_search_by_characters():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab "), size=rng.integers(1, 20)))
        words = [(m, m + len(w)) for m, w in _find_words(text)]
        cuts = np.unique(rng.integers(0, len(text) + 1, rng.integers(1, 12)))
        offsets = np.array([(a, b) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b])
        if words:
            found = find_first_tokens(offsets.reshape(-1, 2), np.array(words))
            assert found.tolist() == brute_force_first(offsets.tolist(), words), (text, offsets)


def _find_words(text):
    start = 0
    for part in text.split(" "):
        if part:
            yield start, part
        start += len(part) + 1


@each_tokenizer
def test_every_word_is_labelled_once_at_its_first_token(tmp_path, tokenizer):
    rng = random.Random(1)
    names = ["O", "B-PER", "I-PER"]
    rows = []
    for _ in range(20):
        words = rng.choices(WORDS, k=rng.randint(1, 40))
        rows.append({"tokens": words, "ner_tags": rng.choices(names, k=len(words))})
    data = write(tmp_path / "a.jsonl", rows, max_seq_len=24)
    objective = name_labels(data, Tag(kind="tag", stride=6))
    assert objective.labels == ("O", "B-PER", "I-PER")
    encoder, counts = make_encoder(tokenizer, token_options(data, objective)), Counts()
    examples = list(read_examples(data.sources, objective="tag"))
    assert counts.split_documents == 0
    for (example, pieces), row in zip(encoder.encode(examples, counts), rows, strict=True):
        labels = np.concatenate([piece.token_columns["token_labels"][piece.supervised] for piece in pieces])
        assert [objective.labels[label] for label in labels] == row["ner_tags"]
        spans = np.concatenate([piece.spans[piece.supervised] for piece in pieces])
        assert [example.text[a:b] for a, b in spans] == row["tokens"]
        for piece in pieces:
            assert len(piece.ids) <= 24
            assert (piece.token_columns["token_labels"][~piece.supervised] == IGNORE_INDEX).all()
            for token, (start, end) in zip(piece.ids[piece.supervised], piece.spans[piece.supervised], strict=True):
                word = example.text[start:end].lower()
                assert tokenizer.decode([token]).strip().removeprefix("##").lower()[:1] in (
                    "",
                    word[0],
                    "[",
                    "<",
                    "�",
                    "n",
                )
    assert counts.split_documents > 0


def test_windows_cover_all_tokens_and_give_words_most_context():
    rng = np.random.default_rng(2)
    for _ in range(200):
        num_tokens = int(rng.integers(1, 80))
        first = np.unique(rng.integers(0, num_tokens, rng.integers(1, 30)))
        room, stride = int(rng.integers(2, 20)), int(rng.integers(0, 20))
        windows, owner = cut_windows(first, num_tokens, room, stride)
        assert windows[0][0] == 0 and windows[-1][1] == num_tokens
        assert all(a < c <= b < d for (a, b), (c, d) in pairwise(windows))
        assert all(0 < b - a <= room for a, b in windows)
        for word, chosen in zip(first, owner, strict=True):
            context = [min(word - a, b - 1 - word) for a, b in windows]
            assert chosen == int(np.argmax(context)) and windows[chosen][0] <= word < windows[chosen][1]


@each_tokenizer
def test_answers_are_in_the_windows_of_transformers(tmp_path, tokenizer):
    rng = random.Random(3)
    rows = []
    for number in range(30):
        context = say(rng, 40)
        words = context.split()
        first = rng.randrange(len(words))
        text = " ".join(words[first : first + rng.randint(1, 2)])
        start = len(" ".join(words[:first])) + (first > 0)
        answers = {"text": [text], "answer_start": [start]} if number % 5 else {"text": [], "answer_start": []}
        rows.append({"question": "where is the fox?", "context": context, "answers": answers})
    data = write(tmp_path / "a.jsonl", rows, max_seq_len=40)
    options = token_options(data, Answer(kind="answer", stride=5))
    encoder = make_encoder(tokenizer, options)
    examples = list(read_examples(data.sources, objective="answer"))
    num_found = 0
    for (example, pieces), row in zip(encoder.encode(examples, Counts()), rows, strict=True):
        expected = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=40,
            stride=5,
            return_overflowing_tokens=True,
        )["input_ids"]
        assert [piece.ids.tolist() for piece in pieces] == expected
        for piece in pieces:
            first, last = (int(piece.document_columns[name]) for name in ("start_labels", "end_labels"))
            if piece.spans[first, 0] < 0:
                assert first == last == 0
                continue
            num_found += 1
            answer, spans = example.label[0], piece.spans
            overlaps = (spans[:, 0] < answer.end) & (spans[:, 1] > answer.start)
            assert np.flatnonzero(overlaps).tolist() == list(range(first, last + 1))
            assert spans[first, 0] <= answer.start and answer.end <= spans[last, 1]
    assert num_found > 15


@each_tokenizer
def test_sources_and_targets_have_the_special_tokens_of_the_tokenizer(tmp_path, tokenizer):
    rows = [{"mr": "the house", "ref": "das Haus"}, {"mr": "fox " * 20, "ref": "dog " * 20}, {"mr": "a", "ref": ""}]
    data = write(tmp_path / "a.jsonl", rows, max_seq_len=30, max_target_len=12)
    dataset = build(data, tokenizer, Seq2Seq(kind="seq2seq", prefix="translate: "))
    assert [dataset.text_name(i) for i in range(4)] == ["source", "target"] * 2
    for i, row in enumerate(rows[:2]):
        source = tokenizer("translate: " + row["mr"], truncation=True, max_length=30)["input_ids"]
        target = tokenizer(text_target=row["ref"])["input_ids"][:12]
        assert ids_of(dataset)[2 * i : 2 * i + 2] == [source, target]
    assert dataset.stats.dropped[0].reason == "Empty target." and dataset.stats.cut_ends == 1
    sequences = make_sequences(dataset, data, 0)
    assert sorted(int(i) for sequence in sequences for i in sequence) == [0, 1, 2, 3]


def test_a_target_has_an_end_even_if_the_tokenizer_adds_none(tmp_path, tokenizer):
    assert tokenizer("fox")["input_ids"][-1] != tokenizer.eos_token_id
    data = write(tmp_path / "a.jsonl", [{"source": "the fox", "target": "a dog"}])
    source, target = ids_of(build(data, tokenizer, Seq2Seq(kind="seq2seq")))
    assert source == tokenizer("the fox")["input_ids"]
    assert target == [*tokenizer("a dog")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize(("style", "length"), [("t5", 568), ("ul2", 568), ("bart", 511)])
def test_texts_are_as_long_as_their_sources_allow(tmp_path, style, length):
    data = write(tmp_path / "a.jsonl", [{"text": "the quick brown fox " * 900}], max_seq_len=512)
    dataset = build(data, TOKENIZERS[2], Span(kind="span", style=style))
    assert dataset.lengths.max() == length and (dataset.lengths[:-1] == length).all()
    sequences = make_sequences(dataset, data, 0)
    assert sequences.longest(dataset.lengths) <= sequences.room == max(512, length)
    assert 0.9 < sequences.efficiency <= 1


@each_tokenizer
@pytest.mark.parametrize("objective", [Mlm(kind="mlm"), Span(kind="span")], ids=["mlm", "span"])
def test_pieces_of_a_text_are_the_text_without_overlap(tmp_path, tokenizer, objective):
    text = "the quick brown fox jumps over the lazy dog " * 8
    dataset = build(write(tmp_path / "a.jsonl", [{"text": text}], max_seq_len=20), tokenizer, objective)
    parts, special = ids_of(dataset), set(tokenizer.all_special_ids)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for part in parts for token in part if token not in special] == expected
    longest = 20 if objective.kind == "mlm" else longest_text(20, denoisers(objective), {})
    assert max(map(len, parts)) == longest and len(parts) > 3
    alone = tokenizer("a")["input_ids"]
    has_special = [part[-1] == alone[-1] for part in parts]
    assert all(has_special) if objective.kind == "mlm" else not any(has_special)
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        assert ((sample.labels == IGNORE_INDEX) == np.isin(sample.input_ids, list(special))).all()


@pytest.mark.parametrize("objective", [Classify(kind="classify"), Seq2Seq(kind="seq2seq")], ids=["classify", "seq2seq"])
def test_rows_with_one_label_cannot_be_split(tmp_path, objective):
    data = write(tmp_path / "a.jsonl", [{"text": "a", "label": 0, "source": "b", "target": "c"}] * 2, too_long="split")
    with pytest.raises(ConfigError, match="cannot be split"):
        build_dataset(data, TOKENIZERS[0], objective=objective.model_copy(update={"problem": "single"}))


def test_rows_to_predict_need_no_label(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"text": "a film"}])
    named = Classify(kind="classify", labels=["a", "b"], problem="single")
    options = replace(token_options(data, named), with_labels=False)
    encoder = make_encoder(TOKENIZERS[0], options)
    ((_, (piece,)),) = encoder.encode(list(read_examples(data.sources, objective="classify")), Counts())
    assert float(piece.document_columns["document_labels"]) == IGNORE_INDEX


OBJECTIVES = {
    "mlm": (Mlm(kind="mlm"), lambda rng: {"text": say(rng, 40)}),
    "classify": (Classify(kind="classify"), lambda rng: {"text": say(rng, 30), "label": rng.choice("ab")}),
    "multi": (
        Classify(kind="classify"),
        lambda rng: {"text": say(rng, 30), "label": rng.sample(["x", "y", "z"], rng.randint(0, 2))},
    ),
    "tag": (
        Tag(kind="tag", stride=4),
        lambda rng: (lambda words: {"tokens": words, "tags": rng.choices("OB", k=len(words))})(say(rng, 60).split()),
    ),
    "answer": (
        Answer(kind="answer", stride=4),
        lambda rng: {
            "question": "who?",
            "context": "fox " + say(rng, 60),
            "answers": [{"text": "fox", "answer_start": 0}],
        },
    ),
    "seq2seq": (Seq2Seq(kind="seq2seq"), lambda rng: {"source": say(rng, 40), "target": say(rng, 9)}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cache_has_the_same_documents_labels_and_rows(tmp_path, monkeypatch, name):
    monkeypatch.setenv("INGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(env, "num_processors", lambda: 1)
    for limit, size in (("_MIN_BYTES", 4000), ("_MEAN_BYTES", 4000), ("_MAX_BYTES", 40_000)):
        monkeypatch.setattr(f"ingle.data.chunks.{limit}", size)
    objective, make_row = OBJECTIVES[name]
    rng = random.Random(5)
    data = write(tmp_path / "a.jsonl", [make_row(rng) for _ in range(150)], max_seq_len=32)
    plain = build(data, TOKENIZERS[0], objective)
    monkeypatch.setattr("ingle.data.dataset_builder._CACHED_BYTES", 0)
    for _ in range(2):  # written, and then read back
        cached = build(data, TOKENIZERS[0], objective)
        assert len(list((tmp_path / "cache").rglob("*.safetensors"))) > 1
        assert cached.stats == plain.stats and cached.fingerprint() == plain.fingerprint()
        assert len(cached) == len(plain)
        for i in range(len(plain)):
            own, other = plain.sample(i), cached.sample(i)
            assert own.input_ids.tolist() == other.input_ids.tolist() and own.columns.keys() == other.columns.keys()
            assert all(own.columns[key].tolist() == other.columns[key].tolist() for key in own.columns)
            assert (plain.origin(i), plain.text_name(i)) == (cached.origin(i), cached.text_name(i))
