"""Reads the samples of a task: prompts and accepted answers, in the formats of training data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ingle.config.evaluate import TaskConfig
from ingle.data import Example, Message, read_examples
from ingle.errors import DataError, EvaluationError
from ingle.evaluation.scorers import make_scorers
from ingle.wording import plural

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TaskSample:
    """One sample of a task.

    Attributes:
        example: The row of the sample (the first of grouped rows), with the first reference as its answer.
        prompt: The prompt as text; empty for plain text.
        references: Accepted answers, at least one; for plain text, the text itself.
    """

    example: Example
    prompt: str
    references: tuple[str, ...]


def read_task(task: TaskConfig, *, on_warning: Warn = lambda message: None) -> tuple[TaskSample, ...]:
    """Reads, groups and draws the held-out samples of a task.

    Args:
        task: The task.
        on_warning: Called with each warning.

    Raises:
        DataError: A row cannot be read, or there is none.
        EvaluationError: A row has no reference answer, or the metrics do not suit the rows.
    """
    samples = [_sample(example) for example in read_examples(task.sources, on_warning=on_warning)]
    if not samples:
        raise DataError(
            "The task has no samples.",
            where="evaluate.sources",
            why=f"no rows in {', '.join(source.path for source in task.sources)}",
            fix="use a file with held-out rows",
        )
    _check_metrics(task, samples)
    groups = _group(samples)
    if task.group_by_prompt:
        samples = groups
    elif len(groups) < len(samples):
        repeated = len(samples) - len(groups)
        on_warning(
            f"{repeated} of {len(samples)} task rows {'repeats' if repeated == 1 else 'repeat'} an earlier prompt, but "
            "intervals and tests assume independent samples. Use evaluate.group_by_prompt=true to make rows with equal "
            "prompts one sample with several references."
        )
    return tuple(_draw(samples, task, on_warning))


def _sample(example: Example) -> TaskSample:
    if example.text is not None:
        return TaskSample(example, "", (_required(example, example.text),))
    if example.prompt is not None:
        assert example.completion is not None
        references = _references(example, example.completion)
        return TaskSample(replace(example, completion=references[0]), example.prompt, references)
    *given, answer = example.messages
    if answer.role != "assistant":
        raise _no_reference(example, f"the last message has role {answer.role}")
    references = _references(example, answer.content)
    example = replace(example, messages=(*given, Message("assistant", references[0])))
    return TaskSample(example, _transcript(given), references)


def _references(example: Example, answer: str) -> tuple[str, ...]:
    """Returns the distinct answers that are not empty."""
    answers = tuple(dict.fromkeys(text for text in (answer, *example.references) if text.strip()))
    return answers or (_required(example, answer),)


def _required(example: Example, text: str) -> str:
    if not text.strip():
        raise _no_reference(example, "the answer is empty")
    return text


def _no_reference(example: Example, why: str) -> EvaluationError:
    return EvaluationError(
        "A task row has no reference answer.",
        where=example.origin,
        why=why,
        fix="give it an assistant message, a completion or a references list, or remove the row",
    )


def _transcript(messages: Iterable[Message]) -> str:
    """Returns a single user message as it is, longer conversations with their roles."""
    turns = list(messages)
    if [turn.role for turn in turns] == ["user"]:
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _check_metrics(task: TaskConfig, samples: list[TaskSample]) -> None:
    answered = [scorer.metric.name for scorer in make_scorers(task) if scorer.metric.reads == "answers"]
    texts = [sample for sample in samples if sample.example.text is not None]
    if answered and texts:
        raise EvaluationError(
            f"Plain text has no prompt, so {', '.join(answered)} cannot score it.",
            where=texts[0].example.origin,
            why=f"{len(texts)} of {plural(len(samples), 'task row')} {'is' if len(texts) == 1 else 'are'} plain text",
            fix="use evaluate.metrics: [bits_per_byte, perplexity], or rows with a prompt and an answer",
        )


def _group(samples: list[TaskSample]) -> list[TaskSample]:
    """Merges samples with equal prompts, in the order of the first of each; the first answer stays first."""
    groups: dict[object, TaskSample] = {}
    for sample in samples:
        example = sample.example
        key = (example.messages[:-1] or example.prompt, example.text)
        known = groups.get(key)
        if known is not None:
            references = tuple(dict.fromkeys((*known.references, *sample.references)))
            sample = replace(known, references=references)
        groups[key] = sample
    return list(groups.values())


def _draw(samples: list[TaskSample], task: TaskConfig, on_warning: Warn) -> list[TaskSample]:
    """Draws ``num_samples`` samples by the seed and keeps their order."""
    if task.num_samples is None or task.num_samples == len(samples):
        return samples
    if task.num_samples > len(samples):
        on_warning(f"The task has only {plural(len(samples), 'sample')}; evaluate.num_samples is {task.num_samples}.")
        return samples
    drawn = random.Random(task.seed).sample(range(len(samples)), task.num_samples)
    return [samples[index] for index in sorted(drawn)]
