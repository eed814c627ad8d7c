"""Reads the samples of a task: prompts and accepted answers, in the formats of training data."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ingle.config.evaluate import TaskConfig
from ingle.config.objective import FAMILY, ObjectiveKind, reads_answers, samples_answers
from ingle.data import Example, Message, read_examples
from ingle.data.label_names import spellings
from ingle.errors import DataError, EvaluationError
from ingle.evaluation.scorers import make_scorers
from ingle.wording import nearest, plural, some

Warn = Callable[[str], None]

#: The names of the two answers of a preference.
BETTER, WORSE = "chosen", "rejected"


@dataclass(frozen=True, slots=True)
class TaskSample:
    """One sample of a task.

    Attributes:
        example: The row of the sample (the first of grouped rows), with the first reference as its answer.
        prompt: The prompt as text; empty for plain text.
        references: Accepted answers; for plain text, the text itself; for a labelled row its label, all labels that are
            true, the tags of the words separated by spaces, or the accepted answers (an empty one if there is none).
        group: Number of the first sample with the same prompt (of a pair or question, the same document), if any; such
            samples are not independent.
    """

    example: Example
    prompt: str
    references: tuple[str, ...]
    group: int | None = None


def read_task(
    task: TaskConfig, objective: ObjectiveKind = "sft", *, on_warning: Warn = lambda message: None
) -> tuple[TaskSample, ...]:
    """Reads, groups and draws the held-out samples of a task.

    Args:
        task: The task.
        objective: Decides, next to the columns, how rows are read.
        on_warning: Called with each warning.

    Raises:
        DataError: A row cannot be read, or there is none.
        EvaluationError: A row has no reference answer, or the metrics do not suit the rows.
    """
    # The task of a language model that learned from preferences or rewards is to write answers.
    writes = samples_answers(objective) or (reads_answers(objective) and FAMILY[objective] != "reward")
    kind: ObjectiveKind = "sft" if writes else objective
    samples = [_sample(example) for example in read_examples(task.sources, objective=kind, on_warning=on_warning)]
    if not samples:
        raise DataError(
            "The task has no samples.",
            where="evaluate.sources",
            why=f"no rows in {', '.join(source.path for source in task.sources)}",
            fix="use a file with held-out rows",
        )
    _check_metrics(task, samples)
    if "reward" in (task.metrics or ()):
        # Rewards read columns that no other metric does, as when answers are sampled for training.
        found = {each.origin: each.columns for each in read_examples(task.sources, objective="grpo")}
        samples = [replace(each, example=_with_columns(each.example, found)) for each in samples]
    if task.group_by_prompt:
        samples = _merge(samples)
    else:
        samples, repeated = _number_groups(samples)
        if repeated:
            on_warning(_warn_repeated(samples, repeated))
    return tuple(_draw(samples, task, on_warning))


def check_labels(samples: Iterable[TaskSample], names: Sequence[str]) -> None:
    """Refuses labels, or tags, that a model does not know.

    Raises:
        EvaluationError: A sample has one.
    """
    known = spellings(names)
    for sample in samples:
        label = sample.example.label
        for name in (label,) if isinstance(label, str) else map(str, label or ()):
            if name not in known:
                near = nearest(name, names)
                raise EvaluationError(
                    f"The label {name[:60]!r} of a held-out row is unknown.",
                    where=sample.example.origin,
                    why=f"the training data has {some(names)}",
                    fix=f"did you mean {near!r}?" if near else "correct the row, or add the name to objective.labels",
                )


def name_references(samples: Iterable[TaskSample], names: Sequence[str]) -> tuple[TaskSample, ...]:
    """Returns samples whose references are names of classes or tags, where rows have their numbers.

    Args:
        samples: Labelled samples.
        names: The labels, or tags, that a model predicts; empty for numbers.
    """
    known = spellings(names)
    return tuple(
        replace(
            sample,
            references=tuple(
                " ".join(known.get(part, part) for part in text.split())
                if sample.example.words
                else known.get(text, text)
                for text in sample.references
            ),
        )
        for sample in samples
    )


def _sample(example: Example) -> TaskSample:
    if _compares(example):
        return _pair_sample(example)
    if example.label is not None or example.texts:
        return _labelled_sample(example)
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


def _with_columns(example: Example, found: Mapping[str, Mapping[str, Any]]) -> Example:
    return replace(example, columns=found.get(example.origin, {}))


def _compares(example: Example) -> bool:
    return any("scores" in text.labels for text in example.texts.values())


def best_and_worst(example: Example) -> tuple[Example, Example] | None:
    """Returns the answers of a row with the highest and the lowest score; None if no score is higher than another."""
    scored = []
    for text in example.texts.values():
        score = text.labels["scores"]
        if isinstance(score, int | float) and not math.isnan(score):
            scored.append((float(score), text))
    scored.sort(key=lambda each: each[0])
    return (scored[-1][1], scored[0][1]) if scored and scored[0][0] < scored[-1][0] else None


def _pair_sample(example: Example) -> TaskSample:
    found = best_and_worst(example)
    if found is None:
        raise EvaluationError("No answer of the row is better than another one.", where=example.origin)
    best, worst = found
    prompt = _transcript(best.messages[:-1]) if best.messages else best.prompt or ""
    return TaskSample(replace(example, texts={BETTER: best, WORSE: worst}), prompt, (BETTER,))


def _labelled_sample(example: Example) -> TaskSample:
    prompt = "\n\n".join(part.text or "" for part in example.texts.values()) if example.texts else example.text
    assert prompt is not None
    if example.label is None:
        raise EvaluationError(
            "A task row has no label.", where=example.origin, fix="give it a label, or remove the row"
        )
    if "context" in example.texts:
        return TaskSample(example, prompt, example.references or ("",))
    label = (example.label,) if isinstance(example.label, str) else tuple(map(str, example.label))
    return TaskSample(example, prompt, (" ".join(label),) if example.words else label)


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


def _no_label(example: Example) -> EvaluationError:
    return EvaluationError("A task row has no label.", where=example.origin, fix="give it a label, or remove the row")


def _transcript(messages: Iterable[Message]) -> str:
    """Returns a single user message as it is, longer conversations with their roles."""
    turns = list(messages)
    if [turn.role for turn in turns] == ["user"]:
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _check_metrics(task: TaskConfig, samples: list[TaskSample]) -> None:
    reads = {scorer.metric.name: scorer.metric.reads for scorer in make_scorers(task)}
    answered = [name for name, kind in reads.items() if kind == "answers"]
    unlabelled = [sample for sample in samples if sample.example.label is None and not _compares(sample.example)]
    if "predictions" in reads.values() and unlabelled:
        raise _no_label(unlabelled[0].example)
    texts = [sample for sample in unlabelled if sample.example.text is not None]
    if answered and texts:
        raise EvaluationError(
            f"Plain text has no prompt, so {', '.join(answered)} cannot score it.",
            where=texts[0].example.origin,
            why=f"{len(texts)} of {plural(len(samples), 'task row')} {'is' if len(texts) == 1 else 'are'} plain text",
            fix="use evaluate.metrics: [bits_per_byte, perplexity], or rows with a prompt and an answer",
        )


def _merge(samples: list[TaskSample]) -> list[TaskSample]:
    """Merges samples with equal prompts, in the order of the first of each; the first answer stays first."""
    labelled = next((sample for sample in samples if sample.example.label is not None), None)
    if labelled is not None:
        raise EvaluationError(
            "Labelled rows cannot be merged.",
            where="evaluate.group_by_prompt",
            why="it makes the answers of rows with one prompt references of one sample; labels are no such answers",
            fix="use evaluate.group_by_prompt=false; rows of one document are one group in the statistics anyway",
        )
    groups: dict[object, TaskSample] = {}
    for sample in samples:
        known = groups.get(_key(sample))
        if known is not None:
            references = tuple(dict.fromkeys((*known.references, *sample.references)))
            sample = replace(known, references=references)
        groups[_key(sample)] = sample
    return list(groups.values())


def _number_groups(samples: list[TaskSample]) -> tuple[list[TaskSample], int]:
    """Returns the samples with their groups, and how many have the key of an earlier one."""
    keys = [_key(sample) for sample in samples]
    sizes = Counter(keys)
    first: dict[object, int] = {}
    numbers = [first.setdefault(key, number) for number, key in enumerate(keys)]
    grouped = [
        replace(sample, group=number) if sizes[key] > 1 else sample
        for sample, key, number in zip(samples, keys, numbers, strict=True)
    ]
    return grouped, len(samples) - len(sizes)


def _key(sample: TaskSample) -> object:
    """Returns what makes samples belong together: the prompt, the context of a question, the first text of a pair."""
    example = sample.example
    if _compares(example):
        return sample.prompt
    if example.texts:
        return example.texts["context"].text if "context" in example.texts else next(iter(example.texts.values())).text
    return example.messages[:-1] or example.prompt, example.text


def _warn_repeated(samples: list[TaskSample], repeated: int) -> str:
    is_labelled = any(sample.example.label is not None for sample in samples)
    share = f"{repeated} of {len(samples)} task rows {'repeats' if repeated == 1 else 'repeat'} an earlier"
    if is_labelled:
        return f"{share} document. Intervals and tests treat the rows of one document as a group."
    return (
        f"{share} prompt. Intervals and tests treat the rows of one prompt as a group. Use "
        "evaluate.group_by_prompt=true to make them one sample with several references."
    )


def _draw(samples: list[TaskSample], task: TaskConfig, on_warning: Warn) -> list[TaskSample]:
    """Draws ``num_samples`` samples by the seed and keeps their order."""
    if task.num_samples is None or task.num_samples == len(samples):
        return samples
    if task.num_samples > len(samples):
        on_warning(f"The task has only {plural(len(samples), 'sample')}; evaluate.num_samples is {task.num_samples}.")
        return samples
    drawn = random.Random(task.seed).sample(range(len(samples)), task.num_samples)
    return [samples[index] for index in sorted(drawn)]
