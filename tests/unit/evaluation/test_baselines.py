"""Rules and prompts that a trained head should beat, and tasks with labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sklearn

from ingle.config import Source, TaskConfig
from ingle.data import Example
from ingle.data.types import Span
from ingle.errors import EvaluationError
from ingle.evaluation import TaskSample, compare, summarize
from ingle.evaluation.run import runner
from ingle.evaluation.run.baselines import (
    MajoritySource,
    OverlapSource,
    PromptedSource,
    count_majority,
    why_not_prompted,
)
from ingle.evaluation.scorers import Likelihood, Prediction
from ingle.evaluation.tasks import samples as task_samples
from ingle.events import Sink


def make_task(*metrics: str) -> TaskConfig:
    return TaskConfig(sources=(Source(path="task.jsonl"),), metrics=metrics)


def labelled(*labels: str) -> list[Example]:
    return [Example(f"task.jsonl:{i + 1}", text=f"text {i}", label=label) for i, label in enumerate(labels)]


def tagged(text: str, tags: str) -> Example:
    words, place = [], 0
    for word in text.split():
        words.append((place, place + len(word)))
        place += len(word) + 1
    return Example("task.conll:1", text=text, words=tuple(words), label=tuple(tags.split()))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """The rows of every task."""
    found: list[Example] = []
    monkeypatch.setattr(task_samples, "read_examples", lambda *args, **options: iter(found))
    return found


def test_the_majority_has_the_accuracy_of_its_share_and_the_log_loss_of_the_entropy(rows: list[Example]) -> None:
    rows += labelled(*"abbbc" * 4)
    source = count_majority(rows, "abcd", "single")
    task = make_task("accuracy", "log_loss", "matthews", "roc_auc")
    found = summarize(runner.run_task(source, task), task).metrics
    assert found["accuracy"].value == 0.6
    assert found["log_loss"].value == pytest.approx(-sum(p * math.log(p) for p in (0.2, 0.6, 0.2)))
    assert (found["matthews"].value, found["roc_auc"].value) == (0.0, 0.5)


def test_the_majority_of_several_labels_and_of_numbers() -> None:
    several = [Example("x:1", text="t", label=label) for label in (("a", "b"), ("b",), ("b", "c"), ())]
    source = count_majority(several, "abc", "multi")
    assert source.prediction.labels == ("b",)
    assert np.exp(source.prediction.scores) == pytest.approx([0.25, 0.75, 0.25])
    assert count_majority(labelled("1", "2.5"), (), "regression").prediction.scores == (1.75,)
    with pytest.raises(EvaluationError, match="needs labelled"):
        count_majority([Example("x:1", text="t")], "ab", "single")


def test_rows_may_have_numbers_of_classes_that_the_config_names(rows: list[Example]) -> None:
    names, task = ("negative", "positive"), make_task("accuracy", "f1_macro")
    rows += labelled("1", "1", "0", "positive")
    task_samples.check_labels(task_samples.read_task(task), names)
    result = runner.run_task(count_majority(rows, names, "single"), task)
    assert result.references == [("positive",), ("positive",), ("negative",), ("positive",)]
    assert result.outputs.predictions[0].labels == ("positive",)
    assert summarize(result, task).metrics["accuracy"].value == 0.75
    with pytest.raises(EvaluationError, match="'2' of a held-out row is unknown"):
        task_samples.check_labels([TaskSample(Example("task.jsonl:5", text="t", label="2"), "t", ("2",))], names)


def test_tags_may_be_numbers_too(rows: list[Example]) -> None:
    names = ("O", "B-LOC")
    rows += [tagged("Paris sleeps", "1 0"), tagged("Rome sleeps", "B-LOC O")]
    result = runner.run_task(count_majority(rows, names, "single"), make_task("entity_f1", "tag_accuracy"))
    assert result.references == [("B-LOC O",), ("B-LOC O",)]
    assert summarize(result, make_task("entity_f1")).metrics["entity_f1"].value == 1.0


def test_words_get_their_usual_tag(rows: list[Example]) -> None:
    train = [
        tagged("Paris sleeps", "B-LOC O"),
        tagged("Paris Hilton sleeps", "B-PER I-PER O"),
        tagged("Paris", "B-LOC"),
    ]
    rows += [tagged("Paris saw Hilton", "B-LOC O O")]
    source = count_majority(train, ("O", "B-LOC", "B-PER", "I-PER"), "single")
    task = make_task("entity_f1", "tag_accuracy")
    result = runner.run_task(source, task)
    assert result.outputs.predictions[0].labels == ("B-LOC", "O", "I-PER")
    assert result.references == [("B-LOC O O",)]
    assert summarize(result, task).metrics["entity_f1"].value == pytest.approx(2 / 3)


def question(question: str, context: str, *answers: str) -> Example:
    texts = {"question": Example("x:1", text=question), "context": Example("x:1", text=context)}
    spans = tuple(Span(context.index(text), context.index(text) + len(text)) for text in answers)
    return Example("squad.json:1", texts=texts, label=spans, references=answers)


def test_the_sentence_with_the_words_of_the_question_is_the_answer(rows: list[Example]) -> None:
    context = "Dogs bark at night. The cat sleeps on the mat! Dr. No waits."
    rows += [question("Where does the cat sleep?", context, "the mat"), question("Who barks at night?", context)]
    task = make_task("squad_f1", "squad_em")
    result = runner.run_task(OverlapSource(), task)
    assert result.outputs.answers == ("The cat sleeps on the mat!", "Dogs bark at night.")
    assert result.references == [("the mat",), ("",)]
    assert summarize(result, task).metrics["squad_f1"].value == pytest.approx((2 * 1 / (4 + 1)) / 2)
    assert [sample.group for sample in result.samples] == [0, 0]  # questions about one context


class Prompted:
    """A language model that prefers one label by its length and by the text."""

    name = "base"

    def answers(self, *args: object) -> Iterator[None]:
        raise AssertionError("the labels are scored, not generated")

    def likelihoods(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Likelihood]:
        for sample in samples:
            assert sample.prompt.startswith("Which label fits this text? Answer with one of: no, yes.")
            answer = sample.example.completion or sample.example.messages[-1].content
            yield Likelihood(1.0 if (answer.strip() == "yes") == ("text 1" in sample.prompt) else 3.0, 1, 3)


@pytest.mark.parametrize("is_chat", [False, True])
def test_zero_shot_probabilities_are_those_of_the_label_names(rows: list[Example], is_chat: bool) -> None:
    rows += labelled("no", "yes", "yes")
    task = make_task("accuracy", "log_loss")
    result = runner.run_task(PromptedSource(Prompted(), ("no", "yes"), is_chat), task)
    assert [prediction.labels for prediction in result.outputs.predictions] == [("no",), ("yes",), ("no",)]
    expected = sklearn.log_loss(
        [0, 1, 1], [[1, 0], [0, 1], [1, 0]] / (1 + np.exp(-2)) + np.array([[0, 1], [1, 0], [0, 1]]) / (1 + np.exp(2))
    )
    assert summarize(result, task).metrics["log_loss"].value == pytest.approx(expected)
    majority = runner.run_task(count_majority(rows, ("no", "yes"), "single"), task)
    assert compare(majority, result, task).metrics["accuracy"].delta == pytest.approx(0.0)


def test_what_cannot_be_prompted_has_a_reason() -> None:
    assert why_not_prompted("ab", "single") is None
    assert "several" in (why_not_prompted("ab", "multi") or "")
    assert "limit is 100" in (why_not_prompted([str(i) for i in range(101)], "single") or "")


def test_rows_and_metrics_must_suit_each_other(rows: list[Example]) -> None:
    rows += labelled("a", "b")
    source = MajoritySource(("a", "b"), Prediction(("a",), (-0.1, -2.0)))
    with pytest.raises(EvaluationError, match="gives no answers") as error:
        runner.run_task(source, make_task("squad_em"))
    assert "use accuracy" in str(error.value)
    with pytest.raises(EvaluationError, match="cannot be merged"):
        runner.run_task(source, make_task("accuracy").model_copy(update={"group_by_prompt": True}))
    rows[1] = Example("task.jsonl:2", texts={"text": Example("x:1", text="a"), "text_pair": Example("x:1", text="b")})
    with pytest.raises(EvaluationError, match="has no label"):
        runner.run_task(source, make_task("accuracy"))
    rows[1] = Example("task.jsonl:2", text="plain")
    with pytest.raises(EvaluationError, match="has no label"):
        runner.run_task(source, make_task("accuracy"))


def test_a_pair_belongs_to_its_document(rows: list[Example], tmp_path: Path) -> None:
    def pair(document: str, summary: str, label: str) -> Example:
        texts = {"text": Example("x:1", text=document), "text_pair": Example("x:1", text=summary)}
        return Example("x:1", texts=texts, label=label)

    rows += [pair("one", "s1", "a"), pair("two", "s2", "b"), pair("one", "s3", "b"), pair("three", "s4", "b")]
    warnings: list[str] = []
    read = task_samples.read_task(make_task("accuracy"), on_warning=warnings.append)
    assert [sample.group for sample in read] == [0, None, 0, None]
    assert read[0].prompt == "one\n\ns1"
    assert warnings == [
        "1 of 4 task rows repeats an earlier document. Intervals and tests treat the rows of one document as a group."
    ]
