"""Layouts of rows with labels: detected by columns and objective, read from the files in which they are published."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from tokenizers import processors

from ingle.config.data import DataConfig, Source
from ingle.config.objective import Answer, Classify, Mlm, Seq2Seq, Span, Tag
from ingle.data import build_dataset, name_labels
from ingle.data.inspection import guess_file, inspect, inspect_rows
from ingle.data.sources import name_classes, read_examples
from ingle.data.types import Span as Place
from ingle.errors import DataError
from ingle.events import Warned
from ingle.report.data_tables import render_report, render_rows
from tests import tiny_tokenizers

BERT, ROBERTA = tiny_tokenizers.bert(), tiny_tokenizers.roberta()

CONLL = """-DOCSTART- -X- -X- O

John NNP B-NP B-PER
lives VBZ B-VP O

New NNP B-NP B-LOC
York NNP I-NP I-LOC
"""
CONLLU = """# text = du fox
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\t_\t_\t_\t_\t_\t_
2\tle\tle\tDET\t_\t_\t_\t_\t_\t_

1\tfox\tfox\tNOUN\t_\t_\t_\t_\t_\t_
"""
ARTICLES = {
    "version": "v2.0",
    "data": [
        {
            "title": "Fox",
            "paragraphs": [
                {
                    "context": "The fox lives in New York.",
                    "qas": [
                        {"id": "1", "question": "Who?", "answers": [{"text": "fox", "answer_start": 4}]},
                        {"id": "2", "question": "Why?", "is_impossible": True, "answers": []},
                    ],
                }
            ],
        },
        {
            "title": "Dog",
            "paragraphs": [{"context": "A dog.", "qas": [{"id": "3", "question": "What?", "answers": []}]}],
        },
    ],
}


def read(path, content, objective, **options):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return list(read_examples([Source(path=str(path), **options)], objective=objective))


@pytest.mark.parametrize(
    ("row", "texts", "label"),
    [
        ({"sentence": "a film", "label": "pos", "idx": 3}, ["a film"], "pos"),
        ({"premise": "a", "hypothesis": "b", "label": 2}, ["a", "b"], "2"),
        ({"doc": "a", "summary": "b", "label": False}, ["a", "b"], "false"),
        ({"review": "a", "stars": 4.0}, ["a"], "4"),
        ({"body": "a", "category": ["x", "y"]}, ["a"], ("x", "y")),
        ({"sentence1": "a", "sentence2": "b", "score": 0.25}, ["a", "b"], "0.25"),
        ({"text": "a"}, ["a"], None),
    ],
)
def test_texts_and_labels_are_found_by_the_names_of_columns(tmp_path, row, texts, label):
    (example,) = read(tmp_path / "a.jsonl", json.dumps(row), "classify")
    found = [each.text for each in example.texts.values()] or [example.text]
    assert (found, example.label) == (texts, label)


def test_the_first_row_decides_for_all_rows_of_a_table(tmp_path):
    rows = '{"sentence": "a", "label": 1}\n{"review": "b", "label": 0}\n'
    with pytest.raises(DataError, match="no column 'sentence'") as caught:
        read(tmp_path / "a.jsonl", rows, "classify")
    assert caught.value.where.endswith(":2")


def test_own_columns_come_before_detection(tmp_path):
    row = json.dumps({"text": "no", "body": "yes", "label": 0, "verdict": "good"})
    options = {"columns": {"text": "body", "label": "verdict"}}
    (example,) = read(tmp_path / "a.jsonl", row, "classify", **options)
    assert (example.text, example.label) == ("yes", "good")


def test_lines_of_a_file_of_one_class(tmp_path):
    examples = read(tmp_path / "a.pos", "a fine film\n\nbeautiful\n", "classify", lines=True, label="positive")
    assert [(e.text, e.label, e.origin.rpartition(":")[2]) for e in examples] == [
        ("a fine film", "positive", "1"),
        ("beautiful", "positive", "3"),
    ]
    with pytest.raises(DataError, match=r"format of a\.pos is unknown") as caught:
        read(tmp_path / "a.pos", "a fine film\n", "classify")
    assert "lines: true" in caught.value.fix


@pytest.mark.parametrize(("name", "options"), [("a.conll", {}), ("a.txt", {"layout": "conll"})])
def test_conll_files(tmp_path, name, options):
    examples = read(tmp_path / name, CONLL, "tag", **options)
    assert [(e.text, e.label, e.origin.rpartition(":")[2]) for e in examples] == [
        ("John lives", ("B-PER", "O"), "3"),
        ("New York", ("B-LOC", "I-LOC"), "6"),
    ]
    assert examples[1].words == ((0, 3), (4, 8))
    chunks = read(tmp_path / name, CONLL, "tag", columns={"tags": "3"}, **options)
    assert chunks[1].label == ("B-NP", "I-NP")
    with pytest.raises(DataError, match="malformed") as caught:
        read(tmp_path / name, CONLL + "in\n", "tag", **options)
    assert caught.value.where.endswith(":8") and "1 columns" in caught.value.why


def test_conllu_files_have_words_and_parts_of_speech(tmp_path):
    examples = read(tmp_path / "a.conllu", CONLLU, "tag")
    assert [(e.text, e.label) for e in examples] == [("de le", ("ADP", "DET")), ("fox", ("NOUN",))]


@pytest.mark.parametrize("content", [ARTICLES, ARTICLES["data"]], ids=["object", "array"])
def test_articles_with_questions(tmp_path, content):
    examples = read(tmp_path / "a.json", content, "answer")
    assert [e.origin.rpartition(":")[2] for e in examples] == ["row 1", "row 2", "row 3"]
    assert [e.label for e in examples] == [(Place(4, 7),), (), ()]
    assert examples[0].references == ("fox",) and examples[2].texts["context"].text == "A dog."


@pytest.mark.parametrize(
    "answers",
    [
        {"answers": {"text": ["fox", "The fox"], "answer_start": [4, 0]}},
        {"answers": [{"text": "fox", "answer_start": 4}, {"text": "The fox", "answer_start": 0}]},
    ],
)
def test_flat_questions(tmp_path, answers):
    row = {"question": "Who?", "context": "The fox.", **answers}
    (example,) = read(tmp_path / "a.jsonl", json.dumps(row), "answer")
    assert example.label == (Place(4, 7), Place(0, 7)) and example.references == ("fox", "The fox")
    (example,) = read(tmp_path / "a.csv", "question,context,answer,answer_start\nWho?,The fox.,fox,4\n", "answer")
    assert example.label == (Place(4, 7),)


@pytest.mark.parametrize(
    "row",
    [
        {"mr": "a", "ref": "b"},
        {"translation": {"en": "a", "de": "b"}},
        {"article": "a", "highlights": "b", "id": 3},
        {"document": "a", "summary": "b"},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_sources_and_targets(tmp_path, row):
    (example,) = read(tmp_path / "a.jsonl", json.dumps(row), "seq2seq")
    assert (example.prompt, example.completion) == ("a", "b")


def test_conversations_have_a_source_and_several_targets(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = json.dumps({"messages": turns, "references": ["c", "b", "c"]})
    columns = {"source": "messages.0.content", "target": "messages.1.content"}
    (example,) = read(tmp_path / "a.jsonl", row, "seq2seq", columns=columns)
    assert (example.prompt, example.completion, example.references) == ("a", "b", ("c",))
    with pytest.raises(DataError, match=r"no column 'messages\.2\.content'"):
        read(tmp_path / "a.jsonl", row, "seq2seq", columns={**columns, "target": "messages.2.content"})


def test_nested_columns_choose_two_of_many_languages(tmp_path):
    row = json.dumps({"translation": {"en": "a", "fr": "b", "de": "c"}})
    columns = {"source": "translation.fr", "target": "translation.en"}
    (example,) = read(tmp_path / "a.jsonl", row, "seq2seq", columns=columns)
    assert (example.prompt, example.completion) == ("b", "a")


def test_columns_of_another_objective_are_recognized(tmp_path):
    with pytest.raises(DataError, match="fit no known layout") as caught:
        read(tmp_path / "a.csv", "mr,ref\na,b\n", "sft")
    assert "--objective.kind=seq2seq" in caught.value.fix
    assert guess_file(str(tmp_path / "a.csv")) == "seq2seq"


def test_classes_of_hub_datasets_have_names():
    names = {"label": ["neg", "pos"], "ner_tags": ["O", "B-PER"]}
    row = {"label": 1, "ner_tags": [0, 1], "text": "a"}
    assert name_classes(row, names) == {"label": "pos", "ner_tags": ["O", "B-PER"], "text": "a"}
    assert name_classes({"label": -1}, names) == {"label": None}


def draw(report, render):
    console = Console(width=150, color_system=None, record=True)
    with console.capture() as capture:
        render(report, console)
    return capture.get()


def look(path, rows, objective, tokenizer=BERT, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig.model_validate({"sources": [str(path)], **options})
    report = inspect(data, tokenizer, objective, num_previews=1)
    return report, draw(report, render_report)


def test_classes_are_shown_with_their_balance(tmp_path):
    rows = [{"text": f"a film {i}", "label": "good"} for i in range(30)] + [{"text": "dull", "label": "bad"}]
    report, text = look(tmp_path / "a.jsonl", rows, Classify(kind="classify"))
    assert [(share.name, share.count) for share in report.labels] == [("bad", 1), ("good", 30)]
    assert report.labels[0].mean_tokens == 3
    assert any("unbalanced" in problem for problem in report.problems)
    assert "label good" in text and "96.8%" in text


@pytest.mark.parametrize(
    ("labels", "odd"),
    [
        (["pos", "neg", 3, "pos", 3, "neg"], "'3' in 2 rows (first {path}:3)"),
        ([1, 2, "n/a", 2, 1], "'n/a' in 1 row (first {path}:3)"),
        ([["pos"], ["neg", 3]], "'3' in 1 row (first {path}:2)"),
        (["3 stars", "4 stars"], None),
        ([1, 2, 1], None),
    ],
)
def test_a_number_among_names_of_classes_is_pointed_out(tmp_path, labels, odd):
    path, warned = tmp_path / "a.jsonl", []
    path.write_text("".join(json.dumps({"text": f"film {i}", "label": each}) + "\n" for i, each in enumerate(labels)))
    data = DataConfig.model_validate({"sources": [str(path)]})
    build_dataset(data, BERT, objective=name_labels(data, Classify(kind="classify")), sink=warned.append)
    found = [event.message for event in warned if isinstance(event, Warned) and "numbers" in event.message]
    expected = [] if odd is None else [odd.format(path=path)]
    assert found == [f"Some labels are numbers and others are names: {each}." for each in expected]


def test_the_same_text_with_another_label_is_counted(tmp_path):
    rows = [{"text": "a film", "label": "good"}, {"text": "a film", "label": "bad"}, {"text": "b", "label": "bad"}]
    report, _ = look(tmp_path / "a.jsonl", rows, Classify(kind="classify"))
    assert (report.duplicates.exact, report.duplicates.same_prompt) == (0, 1)


def test_tags_and_entities_are_counted(tmp_path):
    rows = [{"tokens": ["John", "lives", "in", "New", "York"], "tags": ["B-PER", "O", "O", "B-LOC", "I-LOC"]}] * 3
    report, text = look(tmp_path / "a.jsonl", rows, Tag(kind="tag"))
    assert {share.name: share.count for share in report.labels} == {"O": 6, "B-LOC": 3, "I-LOC": 3, "B-PER": 3}
    assert "LOC 3, PER 3" in text and "john(B-PER)" in text


def cls_last():
    """As XLNet, which ends a pair in CLS."""
    tokenizer = tiny_tokenizers.bert()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    processor = processors.TemplateProcessing("$A [SEP] [CLS]", "$A [SEP] $B:1 [SEP]:1 [CLS]:2", special)
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.mark.parametrize("tokenizer", [BERT, cls_last()], ids=["CLS first", "CLS last"])
def test_answers_are_marked_and_windows_counted(tmp_path, tokenizer):
    context = "the fox lives in New York, " + "and works " * 20
    answers = {"text": ["New York"], "answer_start": [17]}
    rows = [{"question": "where?", "context": context, "answers": answers}]
    report, text = look(tmp_path / "a.jsonl", rows, Answer(kind="answer", stride=4), tokenizer, max_seq_len=32)
    assert report.stats.documents > 1 and report.answered == 1
    assert "«new york»" in text


def test_masks_are_shown_with_what_they_hide(tmp_path):
    report, text = look(tmp_path / "a.jsonl", [{"text": "the quick brown fox " * 6}], Mlm(kind="mlm", rate=0.5))
    hidden = [stretch.text for stretch in report.previews[0].stretches if stretch.supervised]
    assert any(shown in ("[MASK](fox)", "[MASK](the)", "[MASK](quick)", "[MASK](brown)") for shown in hidden)
    assert len(hidden) == report.previews[0].num_supervised and "[MASK](" in text


def test_hidden_white_space_is_visible(tmp_path):
    report, _ = look(
        tmp_path / "a.jsonl", [{"text": "\n" * 40}, {"text": "the\n" * 20}], Mlm(kind="mlm", rate=0.5), ROBERTA
    )
    assert any("(\\n)" in stretch.text for stretch in report.previews[0].stretches)


def test_spans_are_shown_with_their_sentinels(tmp_path):
    tokenizer = tiny_tokenizers.t5()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(20)]})
    rows = [{"text": "the quick brown fox jumps over the lazy dog"}]
    report, text = look(tmp_path / "a.jsonl", rows, Span(kind="span"), tokenizer)
    target = "".join(stretch.text for stretch in report.previews[0].target)
    assert target.startswith("<extra_id_0>") and target.endswith("</s>") and "→" in text


def test_a_source_is_shown_with_its_target(tmp_path):
    report, text = look(tmp_path / "a.jsonl", [{"mr": "the house", "ref": "das Haus"}], Seq2Seq(kind="seq2seq"))
    assert "".join(stretch.text for stretch in report.previews[0].target) == "[CLS]das haus[SEP]"
    assert "the house" in text and "→" in text
    assert (report.lengths.max, report.targets.max) == (4, 4)


def test_the_two_texts_of_a_pair_have_types(tmp_path):
    rows = [{"premise": "the fox", "hypothesis": "a dog", "label": i % 2} for i in range(2)]
    report, text = look(tmp_path / "a.jsonl", rows, Classify(kind="classify"))
    assert report.previews[0].token_types == ((0, 4), (1, 3)) and "types 0 x 4, 1 x 3" in text
    assert "with loss" not in text


def test_unknown_tokens_are_reported(tmp_path):
    report, _ = look(
        tmp_path / "a.jsonl", [{"text": "日本 fox", "label": i % 2} for i in range(2)], Classify(kind="classify")
    )
    assert any("40.0% of the tokens are unknown" in problem for problem in report.problems), report.problems


@pytest.mark.parametrize(
    ("name", "content", "layout", "labels"),
    [
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n', "labelled", {"x": 1, "y": 1}),
        ("a.conll", CONLL, "tagged", {"B-PER": 1, "O": 1, "B-LOC": 1, "I-LOC": 1}),
        ("a.json", json.dumps(ARTICLES), "squad", {}),
        ("a.csv", "mr,ref\na,b\n", "source-target", {}),
    ],
)
def test_files_are_inspected_without_a_model(tmp_path, name, content, layout, labels):
    (tmp_path / name).write_text(content)
    report = inspect_rows(str(tmp_path / name))
    assert set(report.layouts) == {layout} and report.labels == labels
    assert layout in draw(report, render_rows)
