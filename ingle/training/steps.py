"""One optimizer step: micro-batches in, one exact gradient out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ingle.data.types import Batch
from ingle.errors import NonFiniteError
from ingle.models import Model
from ingle.objectives import Objective
from ingle.training.optim import Optimizer


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step was.

    Attributes:
        loss: Mean loss over the step's weight.
        grad_norm: L2 norm of the gradients before clipping.
        num_tokens: Tokens read.
    """

    loss: float
    grad_norm: float
    num_tokens: int


def compute_gradients(model: Model, objective: Objective, batches: Sequence[Batch], *, seed: int, step: int) -> float:
    """Adds up the gradients of a step.

    The loss of each micro-batch is a sum; it is divided by the weight of the whole step before its backward
    pass, so that the way a step is cut into micro-batches does not change the gradient.

    Returns:
        The mean loss of the step.

    Raises:
        NonFiniteError: When a loss is NaN or infinite.
    """
    weight = sum(objective.weight(batch) for batch in batches)
    total = 0.0
    for index, batch in enumerate(batches):
        torch.manual_seed(random_seed(seed, step, index))  # dropout: a pure function of the position in the run
        loss = objective.loss(model, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"The loss became {value} at step {step}.",
                where=f"micro-batch {index + 1} of {len(batches)}, {batch.num_tokens} tokens",
                why=_non_finite_weight(model)
                or "all weights are finite: the values overflowed inside the forward pass",
                fix="a smaller --optim.lr, a longer --optim.warmup_steps, or --model.dtype=float32; "
                "the last checkpoint is intact",
            )
        (loss / weight).backward()
        total += value
    return total / weight


def take_step(
    model: Model, objective: Objective, optimizer: Optimizer, *, lr: float, seed: int, step: int
) -> StepResult:
    """Makes one optimizer step.

    Raises:
        NonFiniteError: When a loss or gradient is NaN or infinite; the weights are then as before the step.
    """
    batches = objective.next_batch()
    loss = compute_gradients(model, objective, batches, seed=seed, step=step)
    grad_norm = optimizer.clip()
    if not math.isfinite(grad_norm):
        culprits = [name for name, gradient in optimizer.gradients() if not torch.isfinite(gradient).all()]
        raise NonFiniteError(
            f"A gradient became NaN or infinite at step {step}; the loss of that step was {loss:.4f}.",
            where=f"first in {culprits[0]}" if culprits else "the norm over all gradients",
            why=f"parameters affected: {len(culprits)}",
            fix="a smaller --optim.lr or --model.dtype=float32; the last checkpoint is intact",
        )
    optimizer.step(lr)
    return StepResult(loss, grad_norm, sum(batch.num_tokens for batch in batches))


def random_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _non_finite_weight(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            return f"{name} holds values that are not finite"
    return None
