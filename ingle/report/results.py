"""Results of runs and evaluations, and their JSON.

These objects are the public Python interface; ``report.json`` and ``ingle evaluate --json`` are their dumps
(:func:`to_dict`), and :func:`from_dict` reads them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

#: Outcome of a comparison: the tuned model is better, worse, or not significantly different.
Outcome = Literal["better", "worse", "unclear"]

#: A 95 % interval; None where it is not defined.
Bounds = tuple[float | None, float | None]

Result = TypeVar("Result")


#: Metadata of a field that has no key in the JSON if it is None.
_OMIT_NONE = {"omit_none": True}


@dataclass(frozen=True, slots=True)
class Pair:
    """A figure of the base and of the tuned model."""

    base: float | None
    tuned: float | None


@dataclass(frozen=True, slots=True)
class UnparsedAnswers:
    """Number of answers in which ``answer_pattern`` matched nothing; they count as wrong."""

    base: int
    tuned: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricComparison:
    """One metric of base and tuned model on the same samples. A figure that is not finite is None.

    Attributes:
        base: Score of the base.
        tuned: Score of the tuned model.
        delta: ``tuned - base``.
        ci95: 95 % interval of ``delta``.
        p: p-value of ``test``.
        p_holm: ``p`` corrected for all metrics of the task by Holm's method; it decides the outcome.
        p_exact: p-value of ``test_exact``.
        p_floor: Smallest value that ``p`` can take, above 0 for a simulation.
        n: Number of samples.
        test: Name of the test.
        test_exact: Name of the exact test per sample.
        interval: Name of the interval.
        signature: All options of the metric; scores with equal signatures can be compared.
        higher_is_better: Direction of improvement.
        outcome: What the difference shows at a level of 5 %.
        num_better: Samples on which the tuned model scored better.
        num_worse: Samples on which it scored worse.
        num_equal: Samples on which both scored the same.
        mde80: Minimum detectable effect: a true difference that as many samples would show to be significant in 80 of
            100 experiments; None for too few samples.
        base_ci95: 95 % interval of ``base``.
        tuned_ci95: 95 % interval of ``tuned``.
        unparsed: Answers without a match of ``answer_pattern``, for rates only.
    """

    base: float | None
    tuned: float | None
    delta: float | None
    ci95: Bounds
    p: float
    p_holm: float
    p_exact: float
    p_floor: float
    n: int
    test: str
    test_exact: str
    interval: str
    signature: str
    higher_is_better: bool
    outcome: Outcome
    num_better: int
    num_worse: int
    num_equal: int
    mde80: float | None
    base_ci95: Bounds
    tuned_ci95: Bounds
    unparsed: UnparsedAnswers | None = field(default=None, metadata=_OMIT_NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleComparison:
    """Both answers to one sample.

    Attributes:
        index: Position in the task; only in ``report.json``, which contains a selection.
        origin: Row of the sample, as ``file:line``.
        prompt: The prompt as text; empty for plain text.
        references: Accepted answers.
        base: Answer of the base; None if no answers were generated.
        tuned: Answer of the tuned model.
        scores: Scores of both by metric.
    """

    index: int | None = field(default=None, metadata=_OMIT_NONE)
    origin: str
    prompt: str
    references: tuple[str, ...]
    base: str | None
    tuned: str | None
    scores: dict[str, Pair]


@dataclass(frozen=True, slots=True)
class ShownSamples:
    """Indices of the samples that a report shows.

    Attributes:
        gains: Largest gains by the headline metric.
        losses: Largest losses.
        random: Drawn by the seed, independent of scores.
        errors: Worst errors of the tuned model; only of labels, tags and answers that were found.
    """

    gains: tuple[int, ...] = ()
    losses: tuple[int, ...] = ()
    random: tuple[int, ...] = ()
    errors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFigures:
    """How well a label, or a type of entity, is predicted.

    Attributes:
        name: The label.
        support: How often it is true.
        precision: Share of its predictions that are right.
        recall: Share of its occurrences that are found.
        f1: Harmonic mean of both.
    """

    name: str
    support: int
    precision: Pair
    recall: Pair
    f1: Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTable:
    """How well each label is predicted.

    Attributes:
        rows: Figures of each label, in the order of the model's outputs.
        confusion: Number of samples by true label (rows) and label that the tuned model predicts (columns); None for
            several labels per sample, for entities and for many labels.
    """

    rows: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall time that each model took for the task."""

    base: float
    tuned: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Base against tuned model on one task.

    Attributes:
        headline: The first metric of the task.
        verdict: One sentence on the headline metric.
        outcome: Outcome of the headline metric.
        n: Number of samples.
        metrics: Figures by metric, in the order of the task.
        samples: Every sample with both answers, in the order of the task.
        shown: The samples that reports show.
        seconds: Wall time.
        base_name: What the tuned model is compared with, such as ``majority``; None for the model without its training.
        classes: How well each label is predicted; None without labels.
    """

    headline: str
    verdict: str
    outcome: Outcome
    n: int
    metrics: dict[str, MetricComparison]
    samples: tuple[SampleComparison, ...]
    shown: ShownSamples
    seconds: Seconds
    base_name: str | None = field(default=None, metadata=_OMIT_NONE)
    classes: ClassTable | None = field(default=None, metadata=_OMIT_NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSummary:
    """One metric of one model; attributes as in :class:`MetricComparison`, ``value`` is the score."""

    value: float | None
    ci95: Bounds
    n: int
    interval: str
    signature: str
    higher_is_better: bool
    unparsed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSummary:
    """One sample with the answer of one model; attributes as in :class:`SampleComparison`."""

    origin: str
    prompt: str
    references: tuple[str, ...]
    answer: str | None
    scores: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One model on one task; attributes as in :class:`Comparison`."""

    headline: str
    n: int
    metrics: dict[str, MetricSummary]
    samples: tuple[SampleSummary, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationPoint:
    """The held-out loss of one step.

    Attributes:
        step: Optimizer steps made.
        loss: Mean loss per supervised unit, in nats.
        gain: How much lower the loss is than that of the last step with a gain that counted; None for the first.
        gain_stderr: Standard error of ``gain``, paired by held-out groups; None where it is not defined.
        rise: How much higher the loss is than the lowest so far, this one included.
        rise_stderr: Standard error of ``rise``.
        metrics: Metrics of the task on a small sample.
    """

    step: int
    loss: float
    gain: float | None = None
    gain_stderr: float | None = None
    rise: float = 0.0
    rise_stderr: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """The validations of a run.

    Attributes:
        every: Steps between validations.
        documents: Held-out documents.
        groups: Groups of held-out documents that are independent of one another.
        tokens: Their tokens.
        best_step: The step with the lowest loss.
        kept_step: The step whose weights are the result.
        stopped_early: Whether early stopping ended the run.
        history: All validations.
        overfit: Whether the last validation is worse than the best one by more than two standard errors.
        verdict: What was kept and why.
    """

    every: int
    documents: int
    groups: int
    tokens: int
    best_step: int
    kept_step: int
    stopped_early: bool
    history: tuple[ValidationPoint, ...]
    overfit: bool = False
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """A finished run: the content of ``report.json``.

    Attributes:
        status: Always ``finished``.
        metrics: Figures by metric; empty if nothing was evaluated.
        num_steps: Optimizer steps.
        num_tokens: Tokens read, unsupervised ones included.
        tokens_per_s: ``num_tokens / train_s``.
        train_s: Seconds of training.
        wall_s: Seconds of the run, including loading and evaluation.
        peak_memory_bytes: Highest resident (CPU) or allocated (GPU) memory.
        plan: The plan that the run printed.
        audit: Parameters and bytes by module class, as the run printed them.
        rounding: Formats whose rounding was part of the training, or None.
        contamination: Held-out rows found in the training data; None if nothing was evaluated.
        validation: The loss on held-out rows during training; None without ``data.validation``.
        run: The run folder.
        model: Id of the model.
        headline: As in :class:`Comparison`, like the rest; None if nothing was evaluated.
        samples: The samples in ``shown``; ``answers.jsonl`` contains all samples.
        base_name: As in :class:`Comparison`.
        classes: As in :class:`Comparison`.
        comparisons: The comparisons with all baselines by their names, if the run has several; the figures above are
            those of the strongest.
    """

    status: str = "finished"
    metrics: dict[str, MetricComparison] = field(default_factory=dict)
    num_steps: int
    num_tokens: int
    tokens_per_s: float
    train_s: float
    wall_s: float
    peak_memory_bytes: int
    plan: dict[str, Any]
    audit: dict[str, Any]
    rounding: dict[str, Any] | None = None
    contamination: dict[str, Any] | None = None
    validation: ValidationReport | None = field(default=None, metadata=_OMIT_NONE)
    run: str
    model: str
    headline: str | None = field(default=None, metadata=_OMIT_NONE)
    verdict: str | None = field(default=None, metadata=_OMIT_NONE)
    outcome: Outcome | None = field(default=None, metadata=_OMIT_NONE)
    n: int | None = field(default=None, metadata=_OMIT_NONE)
    shown: ShownSamples | None = field(default=None, metadata=_OMIT_NONE)
    samples: tuple[SampleComparison, ...] | None = field(default=None, metadata=_OMIT_NONE)
    base_name: str | None = field(default=None, metadata=_OMIT_NONE)
    classes: ClassTable | None = field(default=None, metadata=_OMIT_NONE)
    comparisons: dict[str, Comparison] | None = field(default=None, metadata=_OMIT_NONE)


def to_dict(value: Any) -> Any:
    """Returns a result as plain dicts, lists, strings and numbers."""
    if is_dataclass(value):
        pairs = ((entry, getattr(value, entry.name)) for entry in fields(value))
        return {
            entry.name: to_dict(item) for entry, item in pairs if item is not None or "omit_none" not in entry.metadata
        }
    if isinstance(value, Mapping):
        return {name: to_dict(item) for name, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, list | tuple) else value


def from_dict(kind: type[Result], data: Any) -> Result:
    """Returns the result that :func:`to_dict` dumped.

    Args:
        kind: Its class.
        data: Plain data; unknown keys are ignored.

    Raises:
        ValueError: A value is missing or has another type.
    """
    from pydantic import TypeAdapter  # here, since commands that read no result start faster without it

    return TypeAdapter(kind).validate_python(data)
