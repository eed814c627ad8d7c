"""Reward models as sources of outputs: which of two answers is the better one, and what scores say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ingle.config.evaluate import TaskConfig
from ingle.config.objective import ObjectiveConfig
from ingle.data import Example
from ingle.data.encode_answers import AnswerEncoder, ConversationAnswers
from ingle.data.encode_text_answers import TextAnswers
from ingle.data.row_encoder import row_options
from ingle.data.worker import batches
from ingle.errors import DataError
from ingle.evaluation.run.answer_sources import LoadedModel
from ingle.evaluation.run.packed_logits import document_logits
from ingle.evaluation.run.task_head import OnRows, as_sample
from ingle.evaluation.scorers import Prediction, Problem
from ingle.evaluation.tasks.samples import BETTER, WORSE, TaskSample
from ingle.events import Progress, Sink
from ingle.models import forward_reward, kind_of
from ingle.parallel import compute_device


@dataclass(frozen=True)
class AnswerScores:
    """Scores answers.

    Attributes:
        model: A reward model, in evaluation mode.
        tokenizer: Its tokenizer.
        objective: What it was trained for.
        max_seq_len: Longest document in tokens.
    """

    model: Any
    tokenizer: Any
    objective: ObjectiveConfig
    max_seq_len: int

    @cached_property
    def _encoder(self) -> AnswerEncoder:
        kind = kind_of(self.model.config)
        options = replace(row_options(self.objective, self.max_seq_len), train_on="last", model_kind=kind)
        return (ConversationAnswers if kind == "causal" else TextAnswers)(self.tokenizer, options)

    @torch.no_grad()
    def score(self, rows: Iterable[Example], on_rows: OnRows) -> Iterator[dict[str, float]]:
        """Yields the score of each answer of each row, by the names of the answers; ``answer`` if there is one.

        Args:
            rows: Answers with their prompts.
            on_rows: Called with the number of further rows that are finished.

        Raises:
            DataError: An answer is empty or cannot be tokenized.
        """
        device = compute_device(next(self.model.parameters()))
        for part in batches(rows):
            texts = [row.texts or {"answer": row} for row in part]
            documents = []
            for row, (found, _) in zip(
                part, self._encoder.encode([list(each.values()) for each in texts]), strict=True
            ):
                for pieces in found:
                    if isinstance(pieces, str):
                        raise DataError("The answer cannot be scored.", where=row.origin, why=pieces.rstrip("."))
                    documents.append(as_sample(pieces[0]))
            scores = iter(document_logits(lambda batch: forward_reward(self.model, batch)[:, None], documents, device))
            for own in texts:
                yield {name: float(next(scores)[0]) for name in own}
            on_rows(len(part))


class PairSource:
    """What every source of preferences gives: the name of the better answer."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the two answers."""
        return (BETTER, WORSE)

    @property
    def problem(self) -> Problem:
        """One of the two is better."""
        return "single"


@dataclass(frozen=True)
class RewardSource(PairSource, LoadedModel):
    """A reward model that prefers the answer with the higher score.

    Attributes:
        scores: Scores answers.
    """

    scores: AnswerScores | None = None

    def predictions(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Prediction]:
        """Predicts which answer of each sample is better.

        Raises:
            DataError: An answer is empty or cannot be tokenized.
        """
        assert self.scores is not None
        own = [samples[index].example for index in self._own(len(samples))]
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            sink(Progress(f"Scoring ({self.name})", done, len(own)))

        with self._evaluating():
            found = [_prefer(each[BETTER], each[WORSE]) for each in self.scores.score(own, report)]
        yield from self._of_all(found)


@dataclass(frozen=True)
class LengthSource(PairSource):
    """Prefers the longer answer, or the shorter one.

    Attributes:
        longer: Whether the longer answer is preferred.
        name: Name in progress and reports.
    """

    longer: bool
    name: str = "length"

    def predictions(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Prediction]:
        """Predicts which answer of each sample is better by the number of characters alone."""
        for sample in samples:
            lengths = [count_chars(sample.example.texts[name]) for name in (BETTER, WORSE)]
            yield _prefer(*(length if self.longer else -length for length in lengths))


def count_chars(text: Example) -> int:
    """Returns the length of the answer that ends a text."""
    return len(text.messages[-1].content if text.messages else text.completion or "")


def _prefer(better: float, worse: float) -> Prediction:
    """Returns the preference of two scores; equal ones prefer the worse answer, so that a tie is no success."""
    margin = better - worse
    scores = tuple(-math.log1p(math.exp(-each)) if each > -30 else each for each in (margin, -margin))
    return Prediction((BETTER if margin > 0 else WORSE,), scores, f"{better:.4g} against {worse:.4g}")
