"""The interface between the training loop and an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from ingle.adapters import BaseIdentity
from ingle.data.batch import Batch
from ingle.data.packing import Indices
from ingle.events import Sink
from ingle.models import Model
from ingle.models.forward.dropout import disable_dropout


class Term(NamedTuple):
    """One term of a loss.

    Attributes:
        name: Its key in :attr:`Sums.losses`.
        denominator: The count (a key of :meth:`StepModule.counts`) that its sum is divided by.
        weight: Factor on the mean.
    """

    name: str
    denominator: str
    weight: float = 1.0


class Measure(NamedTuple):
    """A mean to log.

    Attributes:
        name: Its key in :attr:`Sums.metrics`, and its name in ``metrics.jsonl``.
        denominator: The count (a key of :meth:`StepModule.counts`) that its sum is divided by.
    """

    name: str
    denominator: str


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over one micro-batch; adding them over all micro-batches and ranks gives the sums of the step.

    Attributes:
        losses: One differentiable float32 scalar per term.
        metrics: Further scalars to log, detached; one per measure, or none where it is not computed.
    """

    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class OtherModel(Protocol):
    """A model that is read next to the one that is trained."""

    @property
    def model(self) -> Any:
        """The model, with its adapter attached."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""


#: Opens a run folder, an adapter folder, a model folder or a hub id.
OpenModel = Callable[[str], OtherModel]


class StepModule(nn.Module, ABC):
    """Everything that a step computes: encoder, head and loss.

    All weights are read inside ``forward``, so that hooks on this module (DDP, FSDP) see every weight that is used.

    Args:
        model: The model that is trained.

    Attributes:
        measures: Means to log, next to the terms.
        row_measures: Names of further figures of :meth:`per_document`, logged at each validation.
        keeps_dropout: Whether the model may drop activations in training. A loss that compares log-probabilities with
            those of a reference turns this off.
        reads_head_in_backward: Whether the backward pass of the loss reads the weights of the output head.
        reads_states: Whether it reads the last hidden states of the reference.
        uses_hooks: Whether it reads what modules compute through hooks, which compiled layers do not call.
        reduces_once: Whether gradients are added over ranks in the last micro-batch of a step only.
        idle: Names of trained parameters that the loss does not move, since their gradients cancel.
        observe: Called with the number of real tokens of each micro-batch; its context surrounds the forward pass.
    """

    measures: Sequence[Measure] = ()
    row_measures: Sequence[str] = ()
    keeps_dropout: bool = True
    reads_head_in_backward: bool = True
    reads_states: bool = False
    uses_hooks: bool = False
    reduces_once: bool = False
    idle: Sequence[str] = ()
    observe: Callable[[int], AbstractContextManager[None]]

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.observe = lambda num_tokens: nullcontext()
        if not self.keeps_dropout:
            disable_dropout(model)

    @property
    @abstractmethod
    def terms(self) -> Sequence[Term]:
        """The terms of the loss; the first one is what a validation measures."""

    @abstractmethod
    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns the denominators of the terms and of the measures, counted in one micro-batch.

        The loop adds them over the whole step and all ranks. ``tokens``, the number of tokens, is always among them.
        """

    def lr_ratio(self, name: str) -> float:
        """Returns the factor on the learning rate of a trained parameter, by its name in the model or around it."""
        return 1.0

    def load_parts(self, identity: BaseIdentity | None, open_model: OpenModel) -> None:
        """Loads what is read besides the model; called once, when the weights of the model are loaded.

        Args:
            identity: The base of the model's adapter; None without an adapter.
            open_model: Opens other models.
        """

    def save_parts(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Saves what is trained besides the model's adapter; all ranks call it together.

        Args:
            folder: The folder of the run.
            record: Options of :func:`ingle.adapters.save_role`.
        """

    def forward(self, batch: Batch) -> Sums:
        """Computes the sums of one micro-batch."""
        with self.observe(batch.num_tokens):
            return self.compute(batch)

    @abstractmethod
    def compute(self, batch: Batch) -> Sums:
        """Computes the sums of one micro-batch; called by ``forward``.

        A row that counts for nothing adds an exact zero. So a micro-batch of such rows returns zeros that are
        differentiable in all weights that other micro-batches use.
        """

    @abstractmethod
    def per_document(self, batch: Batch) -> Tensor:
        """Returns the loss of each document of a micro-batch, for validation.

        Unlike ``forward``, it is called inside :func:`ingle.parallel.call_outside_step`, and without gradients.

        Returns:
            float64 [D, 2 + 2 K] with K ``row_measures``: the sum of the first term and its denominator, then the sum of
            each measure and its denominator. What several documents of a row have together stands with any of them.
            Documents that :func:`~ingle.data.round_up` added are left out.
        """

    def log_ratios(self, batch: Batch) -> Tensor | None:
        """Returns ``log p - log p of the reference`` of every supervised token of a prepared micro-batch, in nats.

        Without gradients, like :meth:`per_document`. The run proves before its first step that they are 0.

        Returns:
            float32 [M]; None for an objective without a reference.
        """
        return None

    def start_sums(self, batch: Batch) -> Mapping[str, float]:
        """Returns the sums that terms must have before the first step, by name, where they are known.

        For example, ``log 2`` times the number of pairs. The run proves that ``forward`` returns them.
        """
        return {}


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold before the first step.

    Attributes:
        name: What is measured.
        measured: Its value.
        expected: The value that it must have.
        tolerance: Largest difference that rounding explains.
        message: A sentence that says what is wrong if the check fails.
        fix: What to do then.
    """

    name: str
    measured: float
    expected: float
    tolerance: float
    message: str
    fix: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the measured value is the expected one; NaN never is."""
        return self.measured == self.expected or abs(self.measured - self.expected) <= self.tolerance


T = TypeVar("T")


class Relief(Protocol):
    """What an objective does when its device runs out of memory: :class:`ingle.training.out_of_memory.MemoryRelief`."""

    def split(self, batches: Sequence[Batch]) -> list[Batch]:
        """Splits micro-batches into parts; on several ranks, all into equally many."""

    def relieve(self, reason: str, batches: Sequence[Batch]) -> None:
        """Changes the settings so that the next attempt needs less memory."""

    def attempt(self, compute: Callable[[list[Batch]], T], batches: Sequence[Batch]) -> T:
        """Returns what a function computes from micro-batches, split as often as memory demands."""


class Objective(ABC):
    """Supplies batches and the module that turns them into sums.

    The loop divides the sum of each term by its denominator, counted over all micro-batches and ranks of the step. The
    gradient therefore does not depend on how a step is split into micro-batches.

    The phases of a step, in their order: :meth:`collect`, :meth:`next_batches`, :meth:`prepare`, forward and backward
    passes of :attr:`module`, the update of the weights, :meth:`after_step`.

    Attributes:
        module: The module whose ``forward`` returns the sums of a micro-batch.
        prepares: Whether :meth:`prepare` computes anything.
        idle_steps: Steps so far that had nothing to learn from, such as answers that were all equally good.
        is_over: Whether the run is to end before its last step.
        pins_one: Whether :meth:`kept_step` may name an earlier step.
    """

    module: StepModule
    prepares: bool = False
    idle_steps: int = 0
    is_over: bool = False
    pins_one: bool = False

    @property
    @abstractmethod
    def epoch(self) -> float:
        """Passes over the data so far."""

    def load_parts(self, identity: BaseIdentity | None, open_model: OpenModel) -> None:
        """Loads what is read besides the model; see :meth:`StepModule.load_parts`."""
        self.module.load_parts(identity, open_model)

    def collect(self, step: int, relief: Relief, sink: Sink) -> bool:
        """Makes the data of a step with the current weights, such as sampled answers, before the clock of the step.

        Args:
            step: The number of the step, from 1.
            relief: Splits micro-batches on a device that ran out of memory.
            sink: Receives progress.

        Returns:
            False if a rank was asked to stop; the same on all ranks.

        Raises:
            RewardError: Answers cannot be scored; on all ranks. The loop then saves the steps so far.
        """
        return True

    @abstractmethod
    def next_batches(self) -> Sequence[Batch]:
        """Returns this rank's micro-batches of the next step; equally many on all ranks."""

    def prepare(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        """Adds columns that the weights decide to micro-batches, such as log-probabilities of a reference.

        The loop calls it before it counts, with the micro-batches of a step as memory splits them; a validation, with
        all held-out micro-batches. It is called without gradients, outside of any forward pass. All ranks call it
        together, with equally many micro-batches, and must make equally many forward passes.

        Args:
            parts: Micro-batches; those without documents count for nothing.

        Returns:
            As many micro-batches, with the same documents.
        """
        return parts

    def prepare_all(self, num_steps: int, on_progress: Callable[[int, int], None]) -> None:  # noqa: B027 - optional
        """Computes what all steps need of the weights that a run begins with, which full fine-tuning overwrites.

        The loop calls it before it restores a checkpoint, if all weights are trained. All ranks call it together.

        Args:
            num_steps: Steps of the run.
            on_progress: Called with the number of steps that are done, and their total.
        """

    @abstractmethod
    def held_out_batches(self) -> Iterator[tuple[Indices, Batch]]:
        """Yields this rank's micro-batches of the held-out documents, the same ones in every call.

        All ranks get equally many. With each micro-batch come the numbers of its documents in their dataset.
        """

    @property
    def row_measures(self) -> Sequence[str]:
        """Names of further figures of a validation."""
        return self.module.row_measures

    def measure_held_out(self, must_stop: Callable[[], bool]) -> Iterator[tuple[Indices, Tensor] | None] | None:
        """Measures held-out documents in another way than by the loss of :meth:`held_out_batches`.

        All ranks call it together, without gradients.

        Args:
            must_stop: Whether this rank was asked to stop.

        Returns:
            Numbers of this rank's documents with their figures as :meth:`StepModule.per_document` returns them, or None
            where a rank was asked to stop; None instead of all that if there is no other way.
        """
        return None

    def start_checks(self, parts: Sequence[Batch]) -> Sequence[Check]:
        """Returns further checks that must hold before the first step.

        All ranks call it together, without gradients.

        Args:
            parts: The prepared micro-batches of the first step.
        """
        return ()

    def metrics(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
        """Returns further metrics of a step, in addition to the loss, from its sums and counts.

        By default, the mean of each term after the first, without its weight, and of each measure. A mean over nothing
        is left out.
        """
        means: list[Term | Measure] = [*self.module.terms[1:], *self.module.measures]
        found = [mean for mean in means if mean.name in sums and counts.get(mean.denominator)]
        return {mean.name: sums[mean.name] / counts[mean.denominator] for mean in found}

    def kept_step(self, step: int) -> int | None:
        """Returns the step whose weights a run that ends early keeps, while those of ``step`` are saved.

        None for those of its last step; equal on all ranks.
        """
        return None

    def after_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:  # noqa: B027 - optional
        """Learns from the sums and counts of a step whose update was made; they are equal on all ranks."""

    def close(self) -> None:  # noqa: B027 - optional
        """Ends the processes that the objective has started; it starts them again when it needs them."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the state that determines the next batches, as plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
