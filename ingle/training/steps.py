"""One optimizer step: accumulates the gradient over the micro-batches and updates the weights."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ingle.adapters import RankAllocator
from ingle.data.batch import Batch
from ingle.errors import NonFiniteError
from ingle.objectives import Objective, Term
from ingle.parallel import Mesh, local, reduce_in_backward, reset_after_error
from ingle.training.optim import Optimizer
from ingle.training.out_of_memory import MemoryRelief, first_line, is_out_of_memory

_Number = TypeVar("_Number", float, Tensor)


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a step, over all ranks.

    Attributes:
        loss: Weighted sum of the means of all terms.
        grad_norm: L2 norm of the gradients before clipping.
        num_tokens: Tokens read.
        metrics: Further metrics of the objective.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    metrics: dict[str, float]


def take_step(
    objective: Objective,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    lr: float,
    seed: int,
    step: int,
    relief: MemoryRelief | None = None,
    prove: Callable[[Sequence[Batch]], None] | None = None,
    allocator: RankAllocator | None = None,
) -> StepResult:
    """Makes one optimizer step.

    Args:
        objective: Supplies the batches and their loss.
        optimizer: Updates the weights.
        mesh: The ranks.
        lr: The learning rate.
        seed: The seed of the run.
        step: The number of the step, from 1.
        relief: Splits the batches, further if the device runs out of memory; without it, that is an error.
        prove: Called with the prepared batches before their gradients are computed.
        allocator: Chooses the ranks of AdaLoRA.

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite on any rank; the weights are unchanged.
        DoesNotFit: The device ran out of memory, and the batches cannot be split further.
        OutOfMemory: The same on one of several ranks, which must start again.
    """
    batches = objective.next_batches()
    while True:
        parts = batches if relief is None else relief.split(batches)
        try:
            parts = prepare(objective, parts)
            if prove is not None:
                prove(parts)
            sums, counts = compute_gradients(objective, parts, mesh, seed=seed, step=step)
            break
        except (RuntimeError, MemoryError) as error:
            if relief is None or not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # The traceback holds the tensors of the failed attempt, so the memory is free only outside of the handler.
        optimizer.clear()
        reset_after_error(objective.module)
        relief.relieve(reason, batches)
    loss = weighted_mean(objective.module.terms, sums, counts)
    optimizer.sum_gradients()
    penalty = {} if allocator is None else {"orthogonality": allocator.penalize(optimizer.gradients())}
    grad_norm = optimizer.clip()
    if not math.isfinite(grad_norm):  # equal on all ranks
        finite = {name: bool(local(gradient).isfinite().all()) for name, gradient in optimizer.gradients()}
        everywhere = mesh.gather([name for name, is_finite in finite.items() if not is_finite])
        culprits = list(dict.fromkeys(name for names in everywhere for name in names))
        raise NonFiniteError(
            f"A gradient became NaN or infinite at step {step}; the loss of that step was {loss:.4f}.",
            where=f"first in {culprits[0]}" if culprits else "the norm over all gradients",
            why=f"parameters affected: {len(culprits)}",
            fix="use a smaller --optim.lr or --model.dtype=float32; the last checkpoint is intact",
        )
    if allocator is not None:
        allocator.observe(optimizer.gradients())
    optimizer.step(lr)
    if allocator is not None:
        allocator.update(step)
    result = StepResult(loss, grad_norm, int(counts["tokens"]), objective.metrics(sums, counts) | penalty)
    objective.after_step(sums, counts)
    optimizer.clear()
    return result


@torch.no_grad()
def prepare(objective: Objective, parts: Sequence[Batch]) -> Sequence[Batch]:
    """Lets an objective add columns to micro-batches; see :meth:`Objective.prepare`."""
    if not objective.prepares:
        return parts
    prepared = objective.prepare(parts)
    same = [(a.num_documents, b.num_documents) for a, b in zip(parts, prepared, strict=True)]
    assert all(before == after for before, after in same), "the objective changed the documents of a step"
    return prepared


def compute_gradients(
    objective: Objective, batches: Sequence[Batch], mesh: Mesh, *, seed: int, step: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Accumulates the gradients of a step.

    Before the backward pass, the sum of each term is divided by its denominator, counted over all micro-batches and
    ranks of the step. The gradient therefore does not depend on how the step is split into micro-batches.

    Returns:
        The sums and the counts of the step.

    Raises:
        NonFiniteError: A loss is NaN or infinite on any rank.
    """
    own: Counter[str] = Counter()
    for batch in batches:
        own.update({"tokens": batch.num_tokens, **objective.module.counts(batch)})
    counts = mesh.reduce(own)
    computed: list[tuple[str, dict[str, Tensor]]] = []
    for turn, batch in enumerate(batches):
        index = turn * mesh.world_size + mesh.dist_rank  # in the order of the step
        torch.manual_seed(random_seed(seed, step, index))  # dropout: a pure function of the position in the run
        last = turn + 1 == len(batches)
        reduce_in_backward(objective.module, last or not objective.module.reduces_once)
        result = objective.module(batch)
        where = f"micro-batch {index + 1} of {len(batches) * mesh.world_size}, {batch.num_tokens} tokens"
        computed.append((where, {name: value.detach() for name, value in {**result.losses, **result.metrics}.items()}))
        total = weighted_mean(objective.module.terms, result.losses, counts)
        total.backward()
    # Only now, because reading a value waits for the device.
    sums: Counter[str] = Counter()
    failure: tuple[float, str] | None = None
    for where, tensors in computed:
        values = {name: float(value) for name, value in tensors.items()}
        sums.update(values)
        bad = [value for value in values.values() if not math.isfinite(value)]
        if bad and failure is None:
            failure = bad[0], where
    failures = [found for found in mesh.gather(failure) if found is not None]
    if failures:
        value, where = failures[0]
        raise _non_finite_loss(objective.module, value, where, step, mesh)
    return mesh.reduce(sums), counts


def weighted_mean(terms: Sequence[Term], sums: Mapping[str, _Number], counts: Mapping[str, float]) -> _Number:
    """Adds the means of all terms; if the denominator of a term is zero, so are its sum and mean."""
    means = [sums[term.name] / (counts[term.denominator] or 1.0) * term.weight for term in terms]
    total = means[0]
    for mean in means[1:]:
        total = total + mean
    return total


def random_seed(*parts: int) -> int:
    """Returns a 63-bit seed that depends on every part."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _non_finite_loss(module: nn.Module, value: float, where: str, step: int, mesh: Mesh) -> NonFiniteError:
    """Returns the error on all ranks, which must call this together."""
    damaged = (name for name, p in module.named_parameters() if p.is_floating_point() and not local(p).isfinite().all())
    name = next(filter(None, mesh.gather(next(damaged, None))), None)
    return NonFiniteError(
        f"The loss became {value} at step {step}.",
        where=where,
        why=f"{name.removeprefix('model.')} contains values that are not finite"
        if name
        else "all weights are finite: the values overflowed inside the forward pass",
        fix="use a smaller --optim.lr, a longer --optim.warmup_steps, or --model.dtype=float32; "
        "the last checkpoint is intact",
    )
