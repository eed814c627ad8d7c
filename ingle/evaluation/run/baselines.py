"""Rules and prompts that a trained head should beat: its base has no head, so it cannot be the baseline.

* The majority rule predicts what is most frequent in the training data, whatever the text says.
* The overlap rule answers a question with the sentence that shares most words with it.
* The zero-shot baseline asks the base itself, by prompt, which label fits.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ingle.config.evaluate import TaskConfig
from ingle.data import Example, Message
from ingle.data.label_names import spellings
from ingle.errors import EvaluationError
from ingle.evaluation.decoding.classes import decode_classes
from ingle.evaluation.run.answer_sources import Answer, AnswerSource
from ingle.evaluation.scorers import Prediction, Problem
from ingle.evaluation.scorers.classes import EPSILON
from ingle.evaluation.tasks.samples import TaskSample
from ingle.events import Sink

#: The zero-shot baseline reads every text once per label.
MAX_PROMPTED_LABELS = 100

_SENTENCE = re.compile(r"\S.*?(?:[.!?。！？]+[\"')\]]*(?=\s)|$|\n)", re.DOTALL)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class MajoritySource:
    """Predicts the most frequent label of the training data, with the frequencies of all as probabilities.

    Of several labels per text it predicts those that most texts have; of numbers, their mean; for a word, its most
    frequent tag, and for an unknown word the most frequent of all tags.

    Attributes:
        label_names: Names of the labels, or tags; empty for numbers.
        prediction: What it predicts for a text.
        problem: What is predicted.
        tags: The most frequent tag of each word of the training data; empty unless words are tagged.
        name: Name in progress and reports.
    """

    label_names: tuple[str, ...]
    prediction: Prediction
    problem: Problem = "single"
    tags: dict[str, str] = field(default_factory=dict)
    name: str = "majority"

    def predictions(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Prediction]:
        """Yields the same prediction for every sample, or the usual tag of each word."""
        for sample in samples:
            example = sample.example
            if not example.words:
                yield self.prediction
                continue
            text, unknown = example.text or "", self.prediction.labels[0]
            yield Prediction(tuple(self.tags.get(text[start:end], unknown) for start, end in example.words))


def count_majority(examples: Iterable[Example], label_names: Sequence[str], problem: Problem) -> MajoritySource:
    """Returns the majority rule of the training data.

    Args:
        examples: The training data; rows without a label are ignored.
        label_names: Names of the labels, or tags.
        problem: What is predicted.

    Raises:
        EvaluationError: No row has a label.
    """
    counts: Counter[str] = Counter()
    by_word: dict[str, Counter[str]] = defaultdict(Counter)
    num_rows, total, known = 0, 0.0, spellings(label_names)
    for example in examples:
        if example.label is None:
            continue
        written = (example.label,) if isinstance(example.label, str) else map(str, example.label)
        labels = tuple(known.get(label, label) for label in written)
        num_rows += 1
        counts.update(labels)
        total += float(labels[0]) if problem == "regression" else 0.0
        for (start, end), tag in zip(example.words, labels, strict=False):
            by_word[(example.text or "")[start:end]][tag] += 1
    if not num_rows:
        raise EvaluationError("The majority rule needs labelled training data.", where="data.sources")
    tags = {word: _most_frequent(tally, label_names) for word, tally in by_word.items()}
    return MajoritySource(
        tuple(label_names), _frequent(counts, num_rows, total, label_names, problem, bool(tags)), problem, tags
    )


def _frequent(
    counts: Counter[str], num_rows: int, total: float, names: Sequence[str], problem: Problem, tagged: bool
) -> Prediction:
    if problem == "regression":
        return Prediction(scores=(total / num_rows,))
    if tagged:
        return Prediction((_most_frequent(counts, names),))
    logps = tuple(math.log(max(counts[name] / num_rows, EPSILON)) for name in names)
    if problem == "multi":
        return Prediction(tuple(name for name in names if 2 * counts[name] > num_rows), logps)
    return Prediction((_most_frequent(counts, names),), logps)


def _most_frequent(counts: Counter[str], names: Sequence[str]) -> str:
    """Returns the most frequent name; of equally frequent ones, the first."""
    return max(names, key=lambda name: counts[name])


@dataclass(frozen=True)
class OverlapSource:
    """Answers a question with the sentence of the context that has most of its words.

    Attributes:
        name: Name in progress and reports.
    """

    name: str = "word overlap"

    def answers(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Answer]:
        """Yields a sentence per sample, the first of equally good ones."""
        for sample in samples:
            question, context = (sample.example.texts[name].text or "" for name in ("question", "context"))
            asked = set(_WORD.findall(question.lower()))
            sentences = [match.group().strip() for match in _SENTENCE.finditer(context)] or [""]
            yield Answer(max(sentences, key=lambda text: len(asked & set(_WORD.findall(text.lower())))))


@dataclass(frozen=True)
class PromptedSource:
    """Asks a language model for the label of each text; the probability of a label is that of its name as the answer.

    Attributes:
        model: Gives likelihoods of answers.
        label_names: Names of the labels.
        is_chat: Whether the model has a chat template.
        name: Name in progress and reports.
        problem: What is predicted.
    """

    model: AnswerSource
    label_names: tuple[str, ...]
    is_chat: bool = False
    name: str = "zero-shot"
    problem: Problem = "single"

    def predictions(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Prediction]:
        """Yields one prediction per sample."""
        asked = [self._ask(sample, label) for sample in samples for label in self.label_names]
        nll = [likelihood.nll for likelihood in self.model.likelihoods(asked, task, sink)]
        yield from decode_classes(-np.reshape(nll, (len(samples), -1)), self.label_names, "single")

    def _ask(self, sample: TaskSample, label: str) -> TaskSample:
        question = (
            f"Which label fits this text? Answer with one of: {', '.join(self.label_names)}.\n\n{sample.prompt}\n\n"
        )
        if self.is_chat:
            messages = (Message("user", question.rstrip()), Message("assistant", label))
            example = Example(sample.example.origin, messages=messages)
        else:
            example = Example(sample.example.origin, prompt=f"{question}Label:", completion=f" {label}")
        return TaskSample(example, question, (label,))


def why_not_prompted(label_names: Sequence[str], problem: Problem) -> str | None:
    """Returns why there is no zero-shot baseline; None if there is one."""
    if problem != "single":
        return "a prompt asks for one label, and this model predicts several or a number"
    if len(label_names) > MAX_PROMPTED_LABELS:
        return f"{len(label_names):,} labels are too many to ask for each; the limit is {MAX_PROMPTED_LABELS}"
    return None
