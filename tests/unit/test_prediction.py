"""Predictions of models with a task head, against transformers' own, one document at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from ingle import inference, prediction
from ingle.cli.exit_status import run_command
from ingle.config.model import ModelConfig
from ingle.errors import DataError, ModelError
from ingle.evaluation.run.task_head import TaskHead
from ingle.events import Event, Warned
from ingle.prediction import Predictor
from tests import tiny_tokenizers

TEXTS = ["a film of great beauty", "dull", "the quick brown fox jumps over the lazy dog. was it good?"]
TAGS = ("O", "B-PER", "I-PER")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny BERTs in the hub's layout, a folder for each task."""
    folder = tmp_path_factory.mktemp("heads")
    tokenizer = tiny_tokenizers.bert()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    for name, kind, labels in (
        ("classify", hf.BertForSequenceClassification, ("bad", "good", "mixed")),
        ("tag", hf.BertForTokenClassification, TAGS),
        ("answer", hf.BertForQuestionAnswering, ("0", "1")),
        ("mlm", hf.BertForMaskedLM, ("0", "1")),
    ):
        config = hf.BertConfig(**sizes, id2label=dict(enumerate(labels)), dtype="float32")
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def open_exact(folder: Path) -> Predictor:
    """The predictor of a folder in float32."""
    source = inference.Source(ModelConfig(id=str(folder), dtype="float32"), inference.NoBase())
    opened = inference.load(source)
    return Predictor(TaskHead(opened.model, opened.tokenizer, opened.objective, 64))


def their_logits(kind: Any, folder: Path, *texts: str, output: str = "logits") -> torch.Tensor:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = kind.from_pretrained(folder).eval()(**tokenizer(*texts, return_tensors="pt"))[output][0]
    return found


def test_probabilities_of_labels_are_those_of_transformers(folder: Path) -> None:
    predictor = open_exact(folder / "classify")
    rows = [predictor.make_row({"text": text}, f"row {i}") for i, text in enumerate(TEXTS)]
    rows.append(predictor.make_row({"text": TEXTS[1], "pair": TEXTS[0]}, "pair"))
    found = list(predictor.predict(rows))
    expected = [(text,) for text in TEXTS] + [(TEXTS[1], TEXTS[0])]
    for record, texts in zip(found, expected, strict=True):
        probabilities = their_logits(hf.AutoModelForSequenceClassification, folder / "classify", *texts).softmax(0)
        ours = [record["probabilities"][name] for name in ("bad", "good", "mixed")]
        assert ours == pytest.approx(probabilities.tolist(), rel=1e-4)
        assert record["label"] == max(record["probabilities"], key=record["probabilities"].get)
        assert list(record["probabilities"].values()) == sorted(ours, reverse=True)
    assert len(next(predictor.predict(rows[:1], top=2))["probabilities"]) == 2


def test_tagged_spans_have_their_characters_and_the_tags_of_transformers(folder: Path) -> None:
    predictor = open_exact(folder / "tag")
    text = "John Smith lives in New York, and works."
    (record,) = predictor.predict([predictor.make_row({"text": text}, "--text")])
    assert all(text[span["start"] : span["end"]] == span["text"] for span in record["spans"])
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "tag")
    best = their_logits(hf.AutoModelForTokenClassification, folder / "tag", text).softmax(1).max(1)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    tagged = {start for (start, end), tag in zip(offsets, best.indices.tolist(), strict=True) if start < end and tag}
    words = prediction._WORD.finditer(text)
    inside = {word.start() for word in words if word.start() in tagged}
    assert inside == {
        word.start()
        for word in prediction._WORD.finditer(text)
        if any(span["start"] <= word.start() < span["end"] for span in record["spans"])
    }


def test_answers_are_the_best_spans_of_transformers(folder: Path) -> None:
    predictor = open_exact(folder / "answer")
    question, context = "who lives in New York?", "John Smith lives in New York, and works."
    row = predictor.make_row({"question": question, "context": context}, "--question")
    ((best, *_),) = (record["answers"] for record in predictor.predict([row], top=3))
    starts, ends = (
        their_logits(hf.AutoModelForQuestionAnswering, folder / "answer", question, context, output=name)
        for name in ("start_logits", "end_logits")
    )
    encoding = hf.AutoTokenizer.from_pretrained(folder / "answer")(question, context, return_offsets_mapping=True)
    places = [i for i, sequence in enumerate(encoding.sequence_ids()) if sequence == 1]
    scores = {(i, j): float(starts[i] + ends[j]) for i in places for j in places if i <= j}
    first, last = max(scores, key=lambda pair: scores[pair])
    assert best["score"] == pytest.approx(scores[first, last], rel=1e-4)
    assert best["start"] == encoding["offset_mapping"][first][0]
    assert best["text"] == context[best["start"] : best["end"]]


def test_masks_are_filled_with_the_most_likely_tokens(folder: Path) -> None:
    predictor = open_exact(folder / "mlm")
    text = "the quick [MASK] fox jumps over [MASK]"
    (record,) = predictor.predict([predictor.make_row({"text": text}, "--text")], top=2)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "mlm")
    logits = their_logits(hf.AutoModelForMaskedLM, folder / "mlm", text)
    places = [i for i, token in enumerate(tokenizer(text)["input_ids"]) if token == tokenizer.mask_token_id]
    for place, mask in zip(places, record["masks"], strict=True):
        assert text[mask["start"] : mask["end"]] == "[MASK]"
        best = logits[place].softmax(0).topk(2)
        assert [fill["probability"] for fill in mask["fills"]] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert [fill["token"] for fill in mask["fills"]] == [tokenizer.decode([i]).strip() for i in best.indices]
    with pytest.raises(DataError, match="no mask to fill"):
        list(predictor.predict([predictor.make_row({"text": "no mask"}, "--text")]))


def test_files_are_predicted_row_by_row_with_their_lines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, output = tmp_path / "texts.v1.txt", tmp_path / "out" / "found.jsonl"
    file.write_text("\n\n".join(TEXTS))
    assert run_command(["predict", str(folder / "classify"), "--file", str(file), "--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["origin"] for record in records] == [f"{file}:{line}" for line in (1, 3, 5)]
    assert [record["text"] for record in records] == TEXTS
    assert f"Saved predictions: {output}" in "".join(capsys.readouterr().err.split("\n"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n\n".join(TEXTS).encode())))
    assert run_command(["predict", str(folder / "classify"), "--file", "-", "--json"]) == 0
    assert [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()] == [
        record["label"] for record in records
    ]
    words = tmp_path / "words.jsonl"
    words.write_text('{"tokens": ["John", "Smith"]}\n{"text": "John Smith"}\n')
    capsys.readouterr()
    assert run_command(["predict", str(folder / "tag"), "--file", str(words), "--json"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["spans"] == second["spans"]
    words.write_text('{"text": "good"}\n{"text": " "}\n')
    assert run_command(["predict", str(folder / "classify"), "--file", str(words), "--output", str(output)]) != 0
    assert f"{words}:2" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == len(TEXTS), "a file that was complete is kept"


def test_texts_that_are_cut_are_counted_in_one_warning(folder: Path) -> None:
    predictor = open_exact(folder / "classify")
    texts = ("good " * 70, *TEXTS, "bad " * 80)
    rows = [predictor.make_row({"text": text}, f"row {i}") for i, text in enumerate(texts)]
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "classify")
    lost = sum(len(tokenizer(text)["input_ids"]) - 64 for text in (texts[0], texts[-1]))
    message = f"Documents were truncated to data.max_seq_len = 64; {lost} tokens lost."
    for given, expected in ((rows, [Warned(message, "data.max_seq_len", 2)]), (rows[1:-1], [])):
        events = list[Event]()
        assert len(list(predictor.predict(given, sink=events.append))) == len(given)
        assert [event for event in events if isinstance(event, Warned)] == expected


def test_texts_must_suit_the_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="generates no text: it predicts labels of texts") as error:
        inference.open_model(str(folder / "classify"))
    assert "ingle predict" in str(error.value)
    with pytest.raises(DataError, match="does not read --question and --context"):
        open_exact(folder / "classify").make_row({"question": "q", "context": "c"}, "--question")


def test_an_encoder_without_an_output_layer_fills_no_masks(folder: Path, tmp_path: Path) -> None:
    hf.BertModel(hf.BertConfig.from_pretrained(folder / "mlm")).save_pretrained(tmp_path)
    tiny_tokenizers.bert().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a model without its output layer") as error:
        open_exact(tmp_path)
    assert "cls.predictions" in str(error.value)
    assert "--objective.kind=classify" in str(error.value)
