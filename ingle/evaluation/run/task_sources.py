"""Models with a task as sources of outputs: classifiers, taggers, finders of answers, encoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ingle.config.evaluate import TaskConfig
from ingle.config.objective import Answer as AnswerObjective
from ingle.config.objective import Classify, Mlm, ObjectiveConfig, Seq2Seq, Span, Tag
from ingle.config.preferences import Reward
from ingle.data import IGNORE_INDEX, Example, Sample
from ingle.data.batch import Batch, collate
from ingle.data.counters import FIXED_EPOCH, Place
from ingle.data.row_encoder import Piece
from ingle.errors import EvaluationError
from ingle.evaluation.run.answer_sources import Answer, LoadedModel, ModelSource
from ingle.evaluation.run.packed_logits import pack_documents
from ingle.evaluation.run.reward_source import AnswerScores, RewardSource
from ingle.evaluation.run.task_head import TaskHead, as_sample
from ingle.evaluation.scorers import Likelihood, MaskedTokens, Prediction, Problem
from ingle.evaluation.tasks.samples import TaskSample
from ingle.events import Progress, Sink
from ingle.kernels.layers.token_logps import CHUNK_LOGITS
from ingle.models import Head, forward_hidden, through_head
from ingle.objectives import MaskedTokenLoss, TargetLoss, make_corruption
from ingle.objectives.token_loss import sum_documents
from ingle.parallel import Mesh, compute_device

#: The documents of a sample are numbered from its number times this.
_MAX_PIECES = 1 << 20


def make_source(
    model: Any,
    tokenizer: Any,
    objective: ObjectiveConfig,
    max_seq_len: int,
    name: str = "model",
    *,
    mesh: Mesh | None = None,
    in_lockstep: bool = False,
) -> LoadedModel:
    """Returns a model as the source of what it was trained to give.

    Args:
        model: The model, adapters attached.
        tokenizer: Its tokenizer.
        objective: What it was trained for, with the names of all labels.
        max_seq_len: Longest document in tokens.
        name: Name in progress and warnings.
        mesh: The ranks that have the model; None for one process.
        in_lockstep: Whether forward passes are collective.
    """
    options: dict[str, Any] = {"name": name, "mesh": mesh, "in_lockstep": in_lockstep}
    match objective:
        case Classify() | Tag():
            return LabelSource(model, tokenizer, **options, objective=objective, max_seq_len=max_seq_len)
        case AnswerObjective():
            return ContextSource(model, tokenizer, **options, objective=objective, max_seq_len=max_seq_len)
        case Mlm():
            return MaskedSource(model, tokenizer, **options, objective=objective, max_seq_len=max_seq_len)
        case Reward():
            scores = AnswerScores(model, tokenizer, objective, max_seq_len)
            return RewardSource(model, tokenizer, **options, scores=scores)
        case Span() | Seq2Seq():
            return TargetSource(model, tokenizer, **options, objective=objective, max_seq_len=max_seq_len)
        case _:
            return ModelSource(model, tokenizer, **options)


@dataclass(frozen=True)
class _TaskModel(LoadedModel):
    """A model and the rows that it reads.

    Attributes:
        objective: What it was trained for.
        max_seq_len: Longest document in tokens.
    """

    objective: ObjectiveConfig = field(kw_only=True)
    max_seq_len: int = field(kw_only=True)

    @cached_property
    def _head(self) -> TaskHead:
        return TaskHead(self.model, self.tokenizer, self.objective, self.max_seq_len)

    def _read(self, rows: Sequence[Example], sink: Sink) -> Iterator[Sequence[Piece]]:
        """Yields the documents of each row."""
        for _, pieces in self._head.read(rows, sink):
            yield from pieces

    @torch.no_grad()
    def _sum_scores(
        self, samples: Sequence[TaskSample], task: TaskConfig, score: Callable[[Batch], Tensor], sink: Sink
    ) -> list[list[float]]:
        """Returns the sums of scores over the documents of each sample of this rank.

        Args:
            samples: All samples.
            task: Its seed decides which tokens are hidden.
            score: Returns the scores of the documents of a batch, [D, K].
            sink: Receives progress.

        Raises:
            EvaluationError: A row has nothing to predict.
        """
        corrupt = make_corruption(
            self.objective, self.model, self.tokenizer, seed=task.seed, max_length=self.max_seq_len
        )
        assert corrupt is not None
        own = self._own(len(samples))
        documents, owners = list[Sample](), list[int]()
        for number, parts in enumerate(self._read([samples[index].example for index in own], sink)):
            places = [Place(FIXED_EPOCH, own[number] * _MAX_PIECES + piece) for piece in range(len(parts))]
            made = corrupt([as_sample(part) for part in parts], places)
            documents += made
            owners += [number] * len(made)
            if not made:
                raise EvaluationError(
                    "The row has no token to predict.", where=samples[own[number]].example.origin, fix="remove the row"
                )
        sums: list[list[float]] = [[] for _ in own]
        report = _Progress(f"Scoring ({self.name})", len(documents), sink)
        with self._evaluating():
            device = compute_device(next(self.model.parameters()))
            for row in pack_documents(documents):
                found = score(collate([documents[index] for index in row]).to(device)).tolist()
                for index, values in zip(row, found, strict=True):
                    former = sums[owners[index]] or [0.0] * len(values)
                    sums[owners[index]] = [one + other for one, other in zip(former, values, strict=True)]
                report(len(row))
        return sums


class _Progress:
    """Reports rows that are finished."""

    def __init__(self, stage: str, total: int, sink: Sink) -> None:
        self._stage, self._done, self._total, self._sink = stage, 0, total, sink
        self(0)

    def __call__(self, count: int) -> None:
        """Counts further rows."""
        self._done += count
        self._sink(Progress(self._stage, self._done, self._total))


@dataclass(frozen=True)
class LabelSource(_TaskModel):
    """Predicts labels, numbers or tags."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, or tags; empty for numbers."""
        return self._head.label_names

    @property
    def problem(self) -> Problem:
        """What is predicted."""
        return self._head.problem

    def predictions(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Prediction]:
        """Predicts the labels of each sample.

        Raises:
            DataError: A row has no text.
        """
        own = [samples[index].example for index in self._own(len(samples))]
        with self._evaluating():
            found = list(self._head.predict(own, _Progress(f"Predicting ({self.name})", len(own), sink), sink))
        yield from self._of_all(found)


@dataclass(frozen=True)
class ContextSource(_TaskModel):
    """Finds answers in contexts."""

    def answers(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Answer]:
        """Finds the best answer to each sample; an empty text if the context contains none.

        Raises:
            DataError: A question or context cannot be read.
        """
        assert isinstance(self.objective, AnswerObjective)
        own = [samples[index].example for index in self._own(len(samples))]
        can_be_empty = self.objective.no_answer == "allow"
        report = _Progress(f"Answering ({self.name})", len(own), sink)
        with self._evaluating():
            found = self._head.find_answers(own, report, sink, can_be_empty=can_be_empty)
            answers = [
                Answer((row.texts["context"].text or "")[best.start : best.end])
                for row, (best, *_) in zip(own, found, strict=True)
            ]
        yield from self._of_all(answers)


@dataclass(frozen=True)
class MaskedSource(_TaskModel):
    """Restores hidden tokens; which ones are hidden depends on the seed of the task alone."""

    def masked(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[MaskedTokens]:
        """Predicts the hidden tokens of each sample.

        Raises:
            DataError: A row has no text.
        """
        sums = self._sum_scores(samples, task, _MaskedScore(self.model), sink)
        yield from self._of_all([MaskedTokens(nll, int(right), int(count)) for nll, right, count in sums])


@dataclass(frozen=True)
class TargetSource(ModelSource, _TaskModel):
    """Predicts targets from sources: of ``seq2seq`` those of the rows, of ``span`` what is removed from texts."""

    def likelihoods(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Likelihood]:
        """Scores the target of each sample, of ``seq2seq`` its first reference.

        Raises:
            DataError: A row has no text.
            EvaluationError: The targets of ``span`` are only parts of the texts whose bytes would be counted.
        """
        if isinstance(self.objective, Span) and "bits_per_byte" in (task.metrics or ()):
            raise EvaluationError(
                "bits_per_byte needs the likelihood of a whole text; this model predicts what is removed from it.",
                where="evaluate.metrics",
                fix="use perplexity",
            )
        sums = self._sum_scores(samples, task, TargetLoss(self.model).per_document, sink)
        own = [samples[index] for index in self._own(len(samples))]
        yield from self._of_all(
            [
                Likelihood(nll, int(count), len(sample.references[0].encode()))
                for (nll, count), sample in zip(sums, own, strict=True)
            ]
        )

    def _prompts(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> list[list[int]]:
        return [parts[0].ids.tolist() for parts in self._read([sample.example for sample in samples], sink)]


class _MaskedScore(MaskedTokenLoss):
    """Scores hidden tokens."""

    def __call__(self, batch: Batch) -> Tensor:
        """Returns nats, right predictions and hidden tokens of each document, float64 [D, 3]."""
        targets_N = self.targets(batch)
        places = torch.nonzero(targets_N != IGNORE_INDEX)[:, 0]
        scored_M2 = through_head(self.model, _score, forward_hidden(self.model, batch)[0, places], targets_N[places])
        scored_N2 = scored_M2.new_zeros(len(targets_N), 2).index_copy_(0, places, scored_M2)
        nats, counts = sum_documents(scored_N2[:, 0], targets_N != IGNORE_INDEX, batch).T
        rights, _ = sum_documents(scored_N2[:, 1], targets_N != IGNORE_INDEX, batch).T
        return torch.stack([nats, rights, counts], 1)


def _score(output: Head, hidden_MH: Tensor, targets_M: Tensor) -> Tensor:
    """Returns the nats of each target, and whether it is the most likely token, float32 [M, 2]."""
    size = max(1, CHUNK_LOGITS // output.weight.shape[0])
    parts = [hidden_MH.new_zeros(0, 2).float()]
    for hidden, targets in zip(hidden_MH.split(size), targets_M.split(size), strict=True):
        logits = output.logits(hidden).float()
        nats = functional.cross_entropy(logits, targets, reduction="none")
        parts.append(torch.stack([nats, (logits.argmax(1) == targets).float()], 1))
    return torch.cat(parts)
