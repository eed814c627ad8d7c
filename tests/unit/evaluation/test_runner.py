"""Running tasks on sources of answers that are no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ingle.config import Source, TaskConfig
from ingle.errors import EvaluationError
from ingle.evaluation import Answer, TaskSample, evaluate, run_task
from ingle.evaluation.run.runner import strip_thoughts
from ingle.evaluation.scorers import Likelihood
from ingle.events import Event, Sink, Warned
from ingle.report.results import Comparison, Summary


@dataclass
class Listed:
    """A source that reads its answers from a list."""

    texts: Sequence[str]
    name: str = "list"

    def answers(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Answer]:
        for text in self.texts:
            yield Answer(text, "length" if text.endswith("-") else "stop")

    def likelihoods(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Likelihood]:
        for text in self.texts:
            yield Likelihood(2.0 * len(text), 4, 4)


def make_task(tmp_path: Path, metric: str = "exact_match", *answers: str, **options: Any) -> TaskConfig:
    rows = tmp_path / f"{'-'.join(answers)}.jsonl"
    lines = (json.dumps({"prompt": f"question {i}?", "completion": answer}) for i, answer in enumerate(answers))
    rows.write_text("\n".join(lines))
    return TaskConfig(sources=(Source(path=str(rows)),), metrics=(metric,), **options)


@pytest.mark.parametrize(
    ("text", "references", "scored"),
    [
        ("four", ["four"], "four"),
        ("<think>\n\n</think>\n\nfour", ["four"], "four"),
        ("<think>\nTwo and two.\n</think>\n\nfour\n</think>", ["4", "four"], "four\n</think>"),
        ("Two and two.\n</think>\nfour", ["four"], "four"),  # the prompt has opened the thoughts
        ("<think>\nTwo and", ["four"], "<think>\nTwo and"),
        ("<think>a</think>four", ["four", "<think>b</think>four"], "<think>a</think>four"),
    ],
)
def test_thoughts_are_not_part_of_the_answer(text: str, references: list[str], scored: str) -> None:
    assert strip_thoughts(text, references) == scored


def test_any_source_of_answers_can_be_scored(tmp_path: Path) -> None:
    task = make_task(tmp_path, "exact_match", "four", "five")
    events: list[Event] = []
    (summary,) = evaluate(Listed(["<think>\n\n</think>\n\nfour", "six-"]), [task], sink=events.append)
    assert isinstance(summary, Summary)
    assert summary.metrics["exact_match"].value == 0.5
    assert [sample.answer for sample in summary.samples] == ["four", "six-"]
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert warnings[0] == "1 of 2 answers (list) was cut off at 128 tokens."
    assert warnings[1].startswith("These scores are based on only 2 samples")


def test_every_task_gets_a_result_and_a_shared_warning_comes_once(tmp_path: Path) -> None:
    tasks = [make_task(tmp_path, "exact_match", "a", "a"), make_task(tmp_path, "bits_per_byte", "b", "c")]
    tuned, base = Listed(["a", "a"], "tuned"), Listed(["a", "long answer"], "base")
    events: list[Event] = []
    results = evaluate(tuned, tasks, base=base, sink=events.append)
    assert all(isinstance(result, Comparison) for result in results)
    assert [result.headline for result in results] == ["exact_match", "bits_per_byte"]
    assert [(row.num_better, row.num_equal) for result in results for row in result.metrics.values()] == [(1, 1)] * 2
    assert len([event for event in events if isinstance(event, Warned)]) == 1
    stored = [run_task(base, task) for task in tasks]
    again = evaluate(tuned, tasks, base=stored)
    assert [result.metrics for result in again] == [result.metrics for result in results]


@pytest.mark.parametrize("metric", ["exact_match", "perplexity"])
def test_a_source_with_too_few_outputs_is_refused(tmp_path: Path, metric: str) -> None:
    with pytest.raises(EvaluationError, match=r"The source list gave 1 .* for 2 samples"):
        run_task(Listed(["a"]), make_task(tmp_path, metric, "a", "b"))
