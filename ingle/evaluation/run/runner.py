"""Runs tasks on one source of answers, or on a tuned model and its base."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args, overload

from ingle.config.evaluate import TaskConfig
from ingle.config.objective import ObjectiveKind
from ingle.errors import EvaluationError
from ingle.evaluation.comparison import compare, summarize
from ingle.evaluation.run.answer_sources import Answer, OutputSource, PredictionSource
from ingle.evaluation.run.rewards import reward_answers
from ingle.evaluation.scorers import Outputs, make_scorers
from ingle.evaluation.tasks.samples import TaskSample, name_references, read_task
from ingle.evaluation.tasks.task_result import SampleText, TaskResult
from ingle.events import Event, Sink, Warned
from ingle.report.metrics import METRICS, Reads
from ingle.report.results import Comparison, Summary
from ingle.report.verdicts import few_samples
from ingle.wording import either, plural

#: End of the thoughts of reasoning models; the answer follows.
_THOUGHTS_END = "</think>"

_NOUNS: dict[Reads, str] = {
    "answers": "answers",
    "likelihoods": "likelihoods",
    "predictions": "predictions of labels",
    "masked": "predictions of masked tokens",
}


@overload
def evaluate(
    source: OutputSource,
    tasks: Sequence[TaskConfig],
    objective: ObjectiveKind = ...,
    *,
    base: None = None,
    sink: Sink = ...,
) -> list[Summary]: ...


@overload
def evaluate(
    source: OutputSource,
    tasks: Sequence[TaskConfig],
    objective: ObjectiveKind = ...,
    *,
    base: OutputSource | Sequence[TaskResult],
    sink: Sink = ...,
) -> list[Comparison]: ...


def evaluate(
    source: OutputSource,
    tasks: Sequence[TaskConfig],
    objective: ObjectiveKind = "sft",
    *,
    base: OutputSource | Sequence[TaskResult] | None = None,
    sink: Sink = lambda event: None,
) -> list[Comparison] | list[Summary]:
    """Scores a model on tasks, and compares it with its base if there is one.

    Args:
        source: The (tuned) model.
        tasks: The tasks.
        objective: Decides, next to the columns, how rows are read.
        base: The base, or its results for the same tasks.
        sink: Receives progress and warnings.

    Returns:
        One result per task: comparisons with the base, or summaries of one model.

    Raises:
        DataError: The rows of a task cannot be read.
        EvaluationError: The rows do not suit the metrics or the model.
    """
    sink = _warn_once(sink)
    if base is not None and not isinstance(base, Sequence):
        base = [run_task(base, task, objective, sink=sink) for task in tasks]
    results = []
    for task in tasks:
        result = run_task(source, task, objective, sink=sink)
        if warning := few_samples(len(result.samples)):
            sink(Warned(warning, where="evaluate"))
        results.append(result)
    if base is None:
        return [summarize(result, task) for result, task in zip(results, tasks, strict=True)]
    return [compare(before, after, task) for before, after, task in zip(base, results, tasks, strict=True)]


def run_task(
    source: OutputSource, task: TaskConfig, objective: ObjectiveKind = "sft", *, sink: Sink = lambda event: None
) -> TaskResult:
    """Collects the outputs that the metrics of a task need.

    Args:
        source: Yields the outputs.
        task: The task.
        objective: Decides, next to the columns, how rows are read.
        sink: Receives progress and warnings.

    Raises:
        DataError: The rows of the task cannot be read.
        EvaluationError: The rows do not suit the metrics or the source.
    """
    began = time.monotonic()
    samples = read_task(task, objective, on_warning=lambda message: sink(Warned(message, where="evaluate")))
    needed: dict[Reads, list[str]] = defaultdict(list)
    for scorer in make_scorers(task):
        needed[scorer.metric.reads].append(scorer.metric.name)
    if "predictions" in needed and hasattr(source, "label_names"):
        samples = name_references(samples, source.label_names)
    found = {reads: _collect(source, reads, names, samples, task, sink) for reads, names in needed.items()}
    answers, num_unfinished = _finish_answers(source, found.get("answers", ()), samples, task, sink)
    outputs = Outputs(answers, found.get("likelihoods", ()), found.get("predictions", ()), found.get("masked", ()))
    if "reward" in needed.get("answers", ()):
        outputs = replace(outputs, rewards=reward_answers(samples, found["answers"], answers, task, sink))
    if "predictions" in needed:
        predictor = cast(PredictionSource, source)
        outputs = replace(outputs, label_names=predictor.label_names, problem=predictor.problem)
    return TaskResult(
        samples=tuple(
            SampleText(sample.example.origin, sample.prompt, sample.references, sample.group) for sample in samples
        ),
        outputs=outputs,
        num_unfinished=num_unfinished,
        seconds=time.monotonic() - began,
    )


def _collect(
    source: OutputSource,
    reads: Reads,
    metrics: Sequence[str],
    samples: Sequence[TaskSample],
    task: TaskConfig,
    sink: Sink,
) -> tuple[Any, ...]:
    """Returns the outputs of one kind.

    Raises:
        EvaluationError: The source cannot give them, or gave too few or too many.
    """
    method = getattr(source, reads, None)
    if method is None:
        given = [name for name in get_args(Reads) if hasattr(source, name)]
        raise EvaluationError(
            f"{', '.join(metrics)} cannot be computed: the model ({source.name}) gives no {_NOUNS[reads]}.",
            where="evaluate.metrics",
            fix=f"use {either([name for name, metric in METRICS.items() if metric.reads in given])}",
        )
    outputs = tuple(method(samples, task, sink))
    if len(outputs) != len(samples):
        raise EvaluationError(
            f"The source {source.name} gave {len(outputs):,} {_NOUNS[reads]} for {plural(len(samples), 'sample')}."
        )
    return outputs


def _finish_answers(
    source: OutputSource, answers: Sequence[Answer], samples: Sequence[TaskSample], task: TaskConfig, sink: Sink
) -> tuple[tuple[str, ...], int]:
    """Returns the answers as they are scored, and the number of those that were cut off."""
    num_unfinished = sum(answer.finish_reason == "length" for answer in answers)
    if num_unfinished:
        sink(
            Warned(
                f"{num_unfinished} of {plural(len(answers), 'answer')} ({source.name}) "
                f"{'was' if num_unfinished == 1 else 'were'} cut off at {plural(task.max_new_tokens, 'token')}.",
                where="evaluate.max_new_tokens",
                count=num_unfinished,
            )
        )
    pairs = zip(answers, samples, strict=bool(answers))
    return tuple(strip_thoughts(answer.text, sample.references) for answer, sample in pairs), num_unfinished


def strip_thoughts(text: str, references: Sequence[str]) -> str:
    """Returns an answer without the thoughts before it.

    Qwen3's template, for example, starts the last answer with thoughts, empty ones if there are none. If a reference
    contains thoughts itself, the full text is scored.
    """
    _, end, answer = text.partition(_THOUGHTS_END)
    if not end or any(_THOUGHTS_END in reference for reference in references):
        return text
    return answer.lstrip()


def _warn_once(sink: Sink) -> Sink:
    """Returns a sink that passes each warning once, because base and tuned model cause the same ones."""
    warned: set[Event] = set()

    def receive(event: Event) -> None:
        if isinstance(event, Warned):
            if event in warned:
                return
            warned.add(event)
        sink(event)

    return receive
