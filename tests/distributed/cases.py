"""What ranks compute in tests: the loss, the gradients and the weights of some steps of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ingle.assembly import Assembled, assemble
from ingle.config.run import Run
from ingle.parallel import Mesh, full, local
from ingle.training.out_of_memory import MemoryRelief
from ingle.training.steps import compute_gradients, weighted_mean
from ingle.training.validation import Validation
from tests.axis import next_batches

Array = npt.NDArray[np.float64]


class StepOfOneRank(NamedTuple):
    """The result of the last step as one rank sees it.

    Attributes:
        loss: The loss.
        norm: Norm of the gradients.
        gradients: Complete gradients by name, summed over ranks.
        weights: Complete master weights after the step.
        importance: Sums of the importance matrix over ranks, if one is collected.
        base_bytes: Bytes of frozen parameters on this rank.
        num_fused: Fused layers.
        sha256: Digest of the base.
        held_out: Sum and denominator of the validation loss by groups of documents.
    """

    loss: float
    norm: float
    gradients: dict[str, Array]
    weights: dict[str, Array]
    importance: dict[str, Array]
    base_bytes: int
    num_fused: int
    sha256: str | None
    held_out: Array


def take_all(mesh: Mesh, configs: dict[str, dict[str, Any]], num_steps: int = 2) -> dict[str, StepOfOneRank]:
    """Takes the first steps of several runs."""
    return {name: take_steps(config, num_steps) for name, config in configs.items()}


def take_steps(config: dict[str, Any], num_steps: int) -> StepOfOneRank:
    """Takes the first steps of a run."""
    parts = assemble(Run.model_validate(config), lambda event: None)
    for step in range(1, num_steps + 1):
        result = _take_step(parts, step)
    return result._replace(held_out=_validate(parts, config, num_steps))


def _validate(parts: Assembled, config: dict[str, Any], step: int) -> Array:
    """Returns the validation after a step, between whose last forward pass and the next step it comes."""
    relief = MemoryRelief(Path(config["output"]) / "memory.json", parts.mesh, lambda event: None, None)
    run = Run.model_validate(config)
    parts.rounding.prepare(step + 1)
    validation = Validation(run, step, parts.objective, parts.held_out, parts.mesh, relief, dict)
    assert validation.is_due(step)
    found = validation.take(step)
    assert found is not None and not validation.is_due(step)
    table: Tensor = validation.selection.state_dict()["best"]
    return table.numpy()


def _take_step(parts: Assembled, step: int) -> StepOfOneRank:
    objective, optimizer, mesh = parts.objective, parts.optimizer, parts.mesh
    objective.module.train()
    parts.rounding.prepare(step)
    optimizer.begin(step)
    sums, counts = compute_gradients(objective, next_batches(parts, step), mesh, seed=0, step=step)
    optimizer.sum_gradients()
    gradients = {name: _array(gradient) for name, gradient in optimizer.gradients()}
    norm = optimizer.clip()
    optimizer.step(1e-2)
    optimizer.clear()
    frozen = [p for p in parts.model.parameters() if not p.requires_grad]
    return StepOfOneRank(
        loss=weighted_mean(objective.module.terms, sums, counts),
        norm=norm,
        gradients=gradients,
        weights={name: _array(master) for name, master in optimizer.named_masters()},
        importance={} if parts.imatrix is None else {n: e.sums.numpy() for n, e in parts.imatrix.entries().items()},
        base_bytes=sum(local(p).nbytes for p in frozen),
        num_fused=parts.fusion.fused,
        sha256=None if parts.identity is None else parts.identity.sha256,
        held_out=np.zeros((0, 2)),
    )


def _array(tensor: Tensor) -> Array:
    """Returns a complete copy, which the process need not outlive."""
    return full(tensor.detach()).double().numpy()
