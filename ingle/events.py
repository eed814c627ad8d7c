"""Typed events: everything that a run reports.

The flow calls ``sink(event)``; terminals, files and trackers are sinks. Each event has a tag and a JSON form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from ingle.report import results
from ingle.report.results import Comparison, RunReport


@dataclass(frozen=True, slots=True)
class Started:
    """The run is about to start or resume training.

    Attributes:
        run: The resolved config as plain data.
        plan: The plan as plain data (bytes, steps, tokens).
        audit: The loaded model as plain data: bytes per dtype, quantized and trainable parameters per module class.
        step: Steps done before; 0 for a new run.
        num_steps: Steps of the full run.
        resumed_from: The checkpoint folder, or None.
        validated: The last step that was validated before; -1 without validations.
    """

    tag: ClassVar[str] = "started"
    run: dict[str, Any]
    plan: dict[str, Any]
    audit: dict[str, Any]
    step: int
    num_steps: int
    resumed_from: str | None = None
    validated: int = -1


@dataclass(frozen=True, slots=True)
class Proved:
    """The start of the run was checked before its first update.

    Attributes:
        step: Always 0.
        checks: By the name of each check, its value ``measured``, the value ``expected``, and the ``tolerance``.
    """

    tag: ClassVar[str] = "proved"
    step: int
    checks: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step is done.

    Attributes:
        step: Number of the step, from 1.
        loss: Mean loss of the step per supervised unit of the objective (tokens, words, documents), in nats.
        num_tokens: Tokens read so far in the run, including unsupervised ones.
        tokens_per_s: Tokens read per second in this step.
        lr: Learning rate of the first parameter group.
        grad_norm: L2 norm of all gradients before clipping.
        peak_memory_bytes: Highest resident (CPU) or allocated (GPU) memory so far.
        epoch: Passes over the data, fractional.
        metrics: Further metrics of the objective.
    """

    tag: ClassVar[str] = "step"
    step: int
    loss: float
    num_tokens: int
    tokens_per_s: float
    lr: float
    grad_norm: float
    peak_memory_bytes: int
    epoch: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validated:
    """The loss on the held-out rows was measured.

    Attributes:
        step: Steps done.
        loss: Mean loss per supervised unit, in nats.
        best_step: The step with the lowest loss so far.
        best_loss: Its loss.
        gain: How much lower the loss is than that of the last step with a gain that counted; None for the first.
        gain_stderr: Standard error of ``gain``; None where it is not defined.
        metrics: Metrics of the task on a small sample.
        seconds: Wall time.
    """

    tag: ClassVar[str] = "validated"
    step: int
    loss: float
    best_step: int
    best_loss: float
    gain: float | None = None
    gain_stderr: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The tuned model was compared with its base.

    Attributes:
        step: Steps done.
        comparison: The result.
    """

    tag: ClassVar[str] = "evaluated"
    step: int
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Saved:
    """A file or folder is complete on disk.

    Attributes:
        step: Steps done.
        path: The file or folder.
        kind: ``checkpoint``, ``adapter``, ``model``, ``imatrix``, ``report`` or ``predictions``.
    """

    tag: ClassVar[str] = "saved"
    step: int
    path: str
    kind: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something was skipped, truncated or changed, or may not be intended.

    Attributes:
        message: A sentence.
        where: The option or ``file:line``, or None.
        count: Number of occurrences.
        is_note: Whether it says what the run does as its config asks, and nothing may be wrong.
    """

    tag: ClassVar[str] = "warned"
    message: str
    where: str | None = None
    count: int = 1
    is_note: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a long stage other than training (loading, tokenizing, generating).

    Attributes:
        stage: Name of the stage.
        done: Units done.
        total: Units in total, or None if unknown.
    """

    tag: ClassVar[str] = "progress"
    stage: str
    done: int
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Answers were sampled and scored, from which the next steps learn.

    Attributes:
        step: The first step that learns from them.
        iteration: Number of the iteration, from 0.
        samples: Some of them, each with ``prompt``, ``answer``, ``status`` and ``reward`` (None without one).
    """

    tag: ClassVar[str] = "sampled"
    step: int
    iteration: int
    samples: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The run stops with an error.

    Attributes:
        message: The error.
    """

    tag: ClassVar[str] = "failed"
    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is complete.

    Attributes:
        step: Steps done.
        report: The content of ``report.json``.
    """

    tag: ClassVar[str] = "finished"
    step: int
    report: RunReport


Event = Started | Proved | Sampled | Step | Validated | Evaluated | Saved | Warned | Progress | Failed | Finished
Sink = Callable[[Event], None]


def to_dict(event: Event) -> dict[str, Any]:
    """Returns an event as plain data for JSON, with its tag under ``event``.

    JSON has no NaN and no infinity; these are the strings ``NaN``, ``Infinity`` and ``-Infinity``.
    """
    content: dict[str, Any] = _replace_non_finite(results.to_dict(event))
    return {"event": event.tag, **content}


def from_dict(data: dict[str, Any]) -> Event:
    """Returns the event that :func:`to_dict` dumped.

    Raises:
        ValueError: The tag is unknown, or a value is missing or has another type.
    """
    kinds = {kind.tag: kind for kind in get_args(Event)}
    if data.get("event") not in kinds:
        raise ValueError(f"There is no event {data.get('event')!r}.")
    event: Event = results.from_dict(kinds[data["event"]], data)
    return event


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _replace_non_finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_replace_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
