"""Sources of outputs: what the runner scores.

A source can be a loaded model, a server, a file of answers or a rule that any model should beat. The runner only
iterates over what it yields.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, Protocol, Self, TypeVar

from ingle.adapters import has_initial, use
from ingle.config.evaluate import TaskConfig
from ingle.data import ControlTokens, prompt_ids
from ingle.errors import EvaluationError
from ingle.evaluation.run.likelihood import score_references
from ingle.evaluation.run.windows import window_size
from ingle.evaluation.scorers import Likelihood, Prediction, Problem
from ingle.evaluation.tasks.samples import TaskSample
from ingle.events import Progress, Sink, Warned
from ingle.models import generate, text_limit
from ingle.parallel import Mesh, all_gathered
from ingle.wording import plural

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: The text.
        finish_reason: ``length`` if it was cut off, else ``stop``.
        token_ids: Its tokens; empty if they are not known.
    """

    text: str
    finish_reason: Literal["stop", "length"] = "stop"
    token_ids: tuple[int, ...] = ()


class OutputSource(Protocol):
    """Gives outputs for the samples of a task.

    A source has one method for each kind of output that it can give. The methods are named as
    :data:`ingle.report.metrics.Reads` lists the kinds, and take the samples, the task and a sink: see
    :class:`AnswerSource` and :class:`PredictionSource`.
    """

    @property
    def name(self) -> str:
        """Name in progress and warnings."""
        ...


class PredictionSource(OutputSource, Protocol):
    """Predicts labels, numbers or tags; it must not read the references to do so."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, or tags; empty for numbers."""
        ...

    @property
    def problem(self) -> Problem:
        """What is predicted."""
        ...

    def predictions(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterable[Prediction]:
        """Yields one prediction per sample, in order; progress goes to ``sink``."""
        ...


class AnswerSource(OutputSource, Protocol):
    """Answers the samples of a task; it must not read their references to do so."""

    def answers(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterable[Answer]:
        """Yields one answer per sample, in order; progress goes to ``sink``."""
        ...

    def likelihoods(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterable[Likelihood]:
        """Yields the likelihood of the first reference of each sample, in order."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, possibly on several ranks, as a source of outputs.

    Where every rank has all weights, each answers a part of the samples. If weights are gathered layer by layer, all
    ranks must make the same forward passes, so each of them answers all samples: gathering takes most of the time of a
    token, whatever the number of rows.

    Attributes:
        model: The model, adapters attached.
        tokenizer: Its tokenizer.
        name: Name in progress and warnings.
        with_adapters: Whether the adapters are active.
        mesh: The ranks that have the model; None for one process.
        in_lockstep: Whether forward passes are collective.
    """

    model: Any
    tokenizer: Any
    name: str = "model"
    with_adapters: bool = True
    mesh: Mesh | None = None
    in_lockstep: bool = False

    def base(self) -> Self:
        """Returns the same model as it was before training: without its adapters, or with those that it began with."""
        return replace(self, name="base", with_adapters=False)

    def _own(self, num_samples: int) -> range:
        """Returns the samples that this rank answers."""
        if self.mesh is None or self.in_lockstep:
            return range(num_samples)
        return range(self.mesh.dist_rank, num_samples, self.mesh.world_size)

    def _of_all(self, own: Sequence[_Result]) -> Sequence[_Result]:
        """Returns the results of all samples, in order, given those of the samples that this rank answered."""
        if self.mesh is None or self.in_lockstep:
            return own
        turns = zip_longest(*self.mesh.gather(own), fillvalue=None)
        return [result for turn in turns for result in turn if result is not None]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Puts the model into evaluation mode, with all its weights and with or without what it learned."""
        was_training = self.model.training
        self.model.eval()
        before = "initial" if has_initial(self.model) else "off"
        base = nullcontext() if self.with_adapters else use(self.model, before)
        try:
            with base, nullcontext() if self.in_lockstep else all_gathered(self.model):
                yield
        finally:
            self.model.train(was_training)


@dataclass(frozen=True)
class ModelSource(LoadedModel):
    """A language model that continues text."""

    def answers(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Answer]:
        """Generates an answer per sample.

        Raises:
            EvaluationError: A prompt does not fit into the context of the model.
        """
        prompts = self._prompts(samples, task, sink)
        self._check_lengths(prompts, samples)
        own = self._own(len(prompts))
        stage = f"Answering ({self.name})"
        sink(Progress(stage, 0, len(own)))
        with self._evaluating():
            generations = generate(
                self.model,
                self.tokenizer,
                [prompts[index] for index in own],
                max_new_tokens=task.max_new_tokens,
                temperature=task.temperature,
                top_p=task.top_p,
                seed=task.seed,
                streams=own,
                stop=task.stop,
                batch_size=task.batch_size,
                on_progress=lambda done, total: sink(Progress(stage, done, total)),
                agree=self.mesh.broadcast if self.mesh is not None and self.in_lockstep else None,
            )
        yield from self._of_all([Answer(each.text, each.finish_reason, each.token_ids) for each in generations])

    def likelihoods(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterator[Likelihood]:
        """Scores the first reference of each sample.

        Raises:
            EvaluationError: A reference has no token to score.
        """
        own = [samples[index] for index in self._own(len(samples))]

        def warn_cut(count: int) -> None:
            cut = f"{count} of {plural(len(own), 'task prompt')} {'was' if count == 1 else 'were'} cut at the start"
            room = f"to leave room for the answer within {window_size(self.model):,} tokens"
            sink(Warned(f"{cut} {room}.", where="evaluate.sources", count=count))

        with self._evaluating():
            found = score_references(
                self.model,
                self.tokenizer,
                own,
                system=task.system,
                control=ControlTokens(self.tokenizer, task.control_tokens),
                on_progress=lambda done, total: sink(Progress(f"Scoring references ({self.name})", done, total)),
                on_cut=warn_cut,
            )
        yield from self._of_all(found)

    def _prompts(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> list[list[int]]:
        """Returns what the model reads before it answers."""
        control = ControlTokens(self.tokenizer, task.control_tokens)
        return [prompt_ids(self.tokenizer, sample.example, task.system, control=control) for sample in samples]

    def _check_lengths(self, prompts: Sequence[Sequence[int]], samples: Sequence[TaskSample]) -> None:
        limit = text_limit(self.model)
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        if limit is not None and limit <= len(prompts[longest]):
            raise EvaluationError(
                "A task prompt is longer than the model's context.",
                where=samples[longest].example.origin,
                why=f"it has {len(prompts[longest]):,} tokens; the context has {limit:,}, including the answer",
                fix="shorten or remove the row",
            )
