"""Typed events: everything that a run reports.

The flow calls ``sink(event)`` and knows nothing of terminals, files or trackers; those are sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Started:
    """The run is about to start (or resume) training.

    Attributes:
        run: The resolved config as plain data.
        plan: The plan as plain data (bytes, steps, tokens).
        audit: What was loaded: bytes per dtype, quantized and trainable parameters per module class.
        step: Steps made before, 0 for a new run.
        num_steps: Steps in the whole run.
        resumed_from: The checkpoint folder, or None.
    """

    run: dict[str, Any]
    plan: dict[str, Any]
    audit: dict[str, Any]
    step: int
    num_steps: int
    resumed_from: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step has been made.

    Attributes:
        step: 1-based number of the step.
        loss: Mean loss per supervised token of the step, in nats.
        num_tokens: Tokens read so far in the whole run, unsupervised ones included.
        tokens_per_s: Tokens read per second in this step.
        lr: Learning rate of the first parameter group.
        grad_norm: L2 norm of all gradients before clipping.
        peak_memory_bytes: Highest resident (CPU) or allocated (GPU) memory so far.
        epoch: Passes over the data, fractional.
        metrics: What the objective adds.
    """

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
class Evaluated:
    """A comparison is done; ``report`` is the content of ``report.json`` under ``metrics``."""

    step: int
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Saved:
    """A file or folder that the user may want is complete on disk."""

    step: int
    path: str
    kind: str  # checkpoint | adapter | model | imatrix | report


@dataclass(frozen=True, slots=True)
class Warned:
    """Something was skipped, cut or changed; ``count`` says how often."""

    message: str
    where: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """A long stage that is not a training step moves on (loading, tokenizing, generating)."""

    stage: str
    done: int
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The run stops with an error."""

    message: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is complete; ``summary`` is the content of ``report.json``."""

    step: int
    summary: dict[str, Any]


Event = Started | Step | Evaluated | Saved | Warned | Progress | Failed | Finished
Sink = Callable[[Event], None]
