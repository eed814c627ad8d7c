"""Gives a task to a model, and to a model and its base."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ingle.adapters import disabled
from ingle.config.evaluate import TaskConfig
from ingle.data import ControlTokens, Tokenizer, prompt_ids
from ingle.errors import EvaluationError
from ingle.evaluation.compare import compare, summarize
from ingle.evaluation.likelihood import score_references, window_size
from ingle.evaluation.result import Question, TaskResult
from ingle.evaluation.scorers import Likelihood, Outputs, make_scorers
from ingle.evaluation.task import TaskSample, read_task
from ingle.evaluation.wording import few_samples
from ingle.events import Event, Progress, Sink, Warned
from ingle.models import generate, text_limit
from ingle.wording import plural

#: Where reasoning models end their thoughts; what they answer follows.
_THOUGHTS_END = "</think>"


def run_task(
    model: Any, tokenizer: Any, task: TaskConfig, *, sink: Sink = lambda event: None, stage: str = "evaluating"
) -> TaskResult:
    """Answers a task's prompts and scores its references, as far as its metrics need.

    Args:
        model: A filled model; adapters as they are to be tested.
        tokenizer: Its tokenizer.
        task: The task.
        sink: Takes the progress and the warnings.
        stage: What the progress is called; which model answers (``base``, ``tuned``).

    Raises:
        DataError: The task's rows cannot be read.
        EvaluationError: They do not suit the metrics or the model.
    """
    began = time.monotonic()
    samples = read_task(task, on_warning=lambda message: sink(Warned(message, where="evaluate")))
    wanted = {scorer.reads for scorer in make_scorers(task)}
    answers, num_unfinished = _answer(model, tokenizer, samples, task, sink, stage) if "answers" in wanted else ((), 0)
    return TaskResult(
        samples=tuple(Question(sample.example.origin, sample.prompt, sample.references) for sample in samples),
        outputs=Outputs(
            answers=answers,
            likelihoods=_likelihoods(model, tokenizer, samples, task, sink, stage) if "likelihoods" in wanted else (),
        ),
        num_unfinished=num_unfinished,
        seconds=time.monotonic() - began,
    )


def evaluate_pair(
    model: Any,
    tokenizer: Any,
    task: TaskConfig,
    *,
    sink: Sink = lambda event: None,
    base: TaskResult | None = None,
) -> dict[str, Any]:
    """Compares a model with its base: itself without its adapters, or ``base`` when given.

    Args:
        model: The tuned model.
        tokenizer: Its tokenizer.
        task: The task.
        sink: Takes the progress and the warnings.
        base: What the base did with the same task, for a model without adapters.

    Returns:
        What :func:`ingle.evaluation.compare` returns.
    """
    sink = _each_warning_once(sink)
    if base is None:
        with disabled(model):
            base = run_task(model, tokenizer, task, sink=sink, stage="base")
    tuned = run_task(model, tokenizer, task, sink=sink, stage="tuned")
    _warn_of_few(tuned, sink)
    return compare(base, tuned, task)


def evaluate_single(model: Any, tokenizer: Any, task: TaskConfig, *, sink: Sink = lambda event: None) -> dict[str, Any]:
    """The scores of one model with their intervals.

    Returns:
        What :func:`ingle.evaluation.summarize` returns.
    """
    result = run_task(model, tokenizer, task, sink=sink, stage="model")
    _warn_of_few(result, sink)
    return summarize(result, task)


def _each_warning_once(sink: Sink) -> Sink:
    """Base and tuned are given the same samples: what is odd about those is warned of once."""
    warned: set[Event] = set()

    def tell(event: Event) -> None:
        if isinstance(event, Warned):
            if event in warned:
                return
            warned.add(event)
        sink(event)

    return tell


def _warn_of_few(result: TaskResult, sink: Sink) -> None:
    if warning := few_samples(len(result.samples)):
        sink(Warned(warning, where="evaluate"))


def _answer(
    model: Any, tokenizer: Any, samples: tuple[TaskSample, ...], task: TaskConfig, sink: Sink, stage: str
) -> tuple[tuple[str, ...], int]:
    """Generated answers, and how many of them were cut off."""
    control = ControlTokens(tokenizer, task.control_tokens)
    prompts = [prompt_ids(tokenizer, sample.example, task.system, control=control) for sample in samples]
    _check_lengths(model, prompts, samples)
    total = len(prompts)
    sink(Progress(f"{stage}: answering", 0, total))
    generations = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        top_p=task.top_p,
        seed=task.seed,
        stop=task.stop,
        batch_size=task.batch_size,
        on_progress=lambda done, _: sink(Progress(f"{stage}: answering", done, total)),
    )
    num_unfinished = sum(generation.finish_reason == "length" for generation in generations)
    if num_unfinished:
        sink(
            Warned(
                f"{num_unfinished} of {plural(total, 'answer')} ({stage}) "
                f"{'was' if num_unfinished == 1 else 'were'} cut off at {plural(task.max_new_tokens, 'token')}.",
                where="evaluate.max_new_tokens",
                count=num_unfinished,
            )
        )
    pairs = zip(generations, samples, strict=True)
    return tuple(final_answer(generation.text, sample.references) for generation, sample in pairs), num_unfinished


def final_answer(text: str, references: Sequence[str]) -> str:
    """What is scored of a generated text: all but the thoughts before the answer.

    Qwen3's template, for one, opens every last answer with thoughts, empty ones where there are none.  References
    that hold thoughts themselves are compared with the whole text.
    """
    _, end, answer = text.partition(_THOUGHTS_END)
    if not end or any(_THOUGHTS_END in reference for reference in references):
        return text
    return answer.lstrip()


def _check_lengths(model: Any, prompts: list[list[int]], samples: tuple[TaskSample, ...]) -> None:
    limit = text_limit(model)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if limit is not None and limit <= len(prompts[longest]):
        raise EvaluationError(
            "A task prompt is longer than the model's context.",
            where=samples[longest].example.origin,
            why=f"it has {len(prompts[longest]):,} tokens, and the model holds {limit:,}, its answer included",
            fix="shorten or remove the row",
        )


def _likelihoods(
    model: Any, tokenizer: Tokenizer, samples: tuple[TaskSample, ...], task: TaskConfig, sink: Sink, stage: str
) -> tuple[Likelihood, ...]:
    was_training = model.training
    model.eval()
    try:
        return score_references(
            model,
            tokenizer,
            samples,
            system=task.system,
            control=ControlTokens(tokenizer, task.control_tokens),
            on_progress=lambda done, total: sink(Progress(f"{stage}: scoring references", done, total)),
            on_cut=lambda count: sink(
                Warned(
                    f"{count} of {plural(len(samples), 'task prompt')} {'was' if count == 1 else 'were'} cut at the "
                    f"start, to leave room for the answer within {window_size(model):,} tokens.",
                    where="evaluate.sources",
                    count=count,
                )
            ),
        )
    finally:
        model.train(was_training)
