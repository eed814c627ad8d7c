"""The proof of the start: before the first update, a run shows that it begins where it says it does.

The checks read the first micro-batch of every rank, prepared as the first step reads it. They compute without gradients
and change nothing that training depends on. A run that fails one of them does not start.

Legend: D documents, M supervised tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ingle import adapters
from ingle.atomic import write_atomically
from ingle.data.batch import Batch
from ingle.errors import ProofFailed
from ingle.events import Proved, Sink
from ingle.objectives import Check, Objective, StepModule
from ingle.parallel import Mesh, call_outside_step

#: Largest difference of a log-probability by rounding, in nats per token.
_PER_TOKEN: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-5}
#: Largest relative difference of a loss by rounding.
_OF_LOSS: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-4}
#: Both in bfloat16 and float16.
_IN_HALF = 2e-2
#: Factor on the tolerance for values from a file, which other micro-batches have computed.
_CACHED = 10.0

#: Makes a model compute another function inside a block.
Switch = Callable[[], AbstractContextManager[None]]


def prove_start(
    parts: Sequence[Batch],
    objective: Objective,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    has_adapter: bool,
    file: Path,
    sink: Sink,
) -> None:
    """Proves the start of a run, keeps the proof in a file, and reports it. All ranks call it together.

    Args:
        parts: The prepared micro-batches of the first step.
        objective: What is trained.
        mesh: The ranks.
        dtype: The dtype of the computation.
        has_adapter: Whether an adapter is trained, instead of all weights.
        file: Where the proof is kept.
        sink: Receives it.

    Raises:
        ProofFailed: The run does not begin at its initial function, or a loss not at its known value.
    """
    found = check_start(objective, parts, mesh, dtype=dtype, has_adapter=has_adapter)
    if not found:
        return
    failed = next((check for check in found if not check.holds), None)
    if failed is not None:
        raise ProofFailed(
            failed.message,
            where=f"the proof of the start: {failed.name}",
            why=f"measured {failed.measured:.6g}, expected {failed.expected:.6g} within {failed.tolerance:.2g}",
            fix=failed.fix,
        )
    figures = ("measured", "expected", "tolerance")
    proved = Proved(0, {check.name: {name: float(getattr(check, name)) for name in figures} for check in found})
    mesh.on_main(lambda: write_atomically(file, (json.dumps(proved.checks, indent=1) + "\n").encode()))
    sink(proved)


@torch.no_grad()
def check_start(
    objective: Objective, parts: Sequence[Batch], mesh: Mesh, *, dtype: torch.dtype, has_adapter: bool
) -> list[Check]:
    """Returns all checks; of each, that of the rank where it is furthest off. All ranks call it together."""
    module, part = objective.module, parts[0]
    switch = initial_function(module.model, mesh) if has_adapter else None
    was_training = module.training
    try:
        # Compiled code for passes without gradients would be used this once.
        with torch.compiler.set_stance("force_eager"):
            own = [*_checks(module, part, switch, dtype), *objective.start_checks(parts)]
    finally:
        module.train(was_training)
    everywhere = mesh.gather(own)
    return [max(found, key=_distance) for found in zip(*everywhere, strict=True)]


def initial_function(model: nn.Module, mesh: Mesh) -> Switch | None:
    """Returns what makes a model compute its initial function.

    None if nothing was kept of it, as of an adapter that continues another one without a reference; or if layers train
    through the rounding of their merge from the first step.
    """
    is_rounded = any(layer.merged is not None for layer in adapters.lora_modules(model).values())
    has_none = mesh.agree(is_rounded or not adapters.has_initial(model))
    return None if has_none else partial(adapters.use, model, "initial")


def _checks(module: StepModule, part: Batch, switch: Switch | None, dtype: torch.dtype) -> Iterator[Check]:
    """Yields the checks of any objective on one micro-batch."""
    if switch is not None:
        yield _adapter_equals_base(module, part, switch, _OF_LOSS.get(dtype, _IN_HALF))
    module.train()
    if not module.keeps_dropout:
        yield _no_dropout(module, part)
    yield from _log_ratios(module, part, switch, _PER_TOKEN.get(dtype, _IN_HALF))
    yield from _start_sums(module, part, _OF_LOSS.get(dtype, _IN_HALF))


def _adapter_equals_base(module: StepModule, part: Batch, switch: Switch, tolerance: float) -> Check:
    module.eval()
    tuned_DC = call_outside_step(module, module.per_document, part)
    with switch():
        base_DC = call_outside_step(module, module.per_document, part)
    scale_D = base_DC[:, :2].abs().amax(1).clamp_min(torch.finfo(base_DC.dtype).tiny)
    is_new = all(each.starts_at_base for each in adapters.adapted_modules(module.model).values())
    return Check(
        "adapter equals base" if is_new else "adapter equals its start",
        _largest((tuned_DC[:, 0] - base_DC[:, 0]) / scale_D),
        0.0,
        tolerance,
        "The model with its adapter differs from its initial function.",
        "use --model.dtype=float32, or name other layers in adapter.target_modules",
    )


def _no_dropout(module: StepModule, part: Batch) -> Check:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(call_outside_step(module, module.compute, part).losses)
    difference = torch.stack([found[0][name] - value for name, value in found[1].items()])
    # An adapter whose B is zero still hides its dropout.
    layers = adapters.adapted_modules(module.model).values()
    of_adapters = [float(getattr(layer, "dropout", 0.0)) for layer in layers]
    return Check(
        "no dropout",
        max([_largest(difference), *of_adapters]),
        0.0,
        0.0 if difference.device.type == "cpu" else _IN_HALF,  # a GPU adds in no fixed order
        "Two passes over the same rows give different losses, so chance would be part of every log-ratio.",
        "set --adapter.dropout=0; without it, this architecture draws random numbers that Ingle cannot turn off",
    )


def _log_ratios(module: StepModule, part: Batch, switch: Switch | None, tolerance: float) -> Iterator[Check]:
    policy_M = call_outside_step(module, module.log_ratios, part)
    if policy_M is None:
        return
    initial_M = torch.zeros_like(policy_M)
    if switch is None:  # the model itself is compared with stored values
        tolerance *= _CACHED
    if switch is not None:
        with switch():
            again_M = call_outside_step(module, module.log_ratios, part)
        assert again_M is not None, "an objective has a reference or not"
        initial_M = again_M
    yield Check(
        "log-ratio",
        _largest(policy_M - initial_M),
        0.0,
        tolerance,
        "The policy differs from its reference before the first step.",
        "set --adapter.dropout=0, and leave out adapter.merge_aware",
    )
    yield Check(
        "stored reference",
        _largest(initial_M),
        0.0,
        tolerance if switch is None else _CACHED * tolerance,
        "The stored log-probabilities of the reference are not those of this model.",
        "delete the cached log-probabilities, and start again",
    )


def _start_sums(module: StepModule, part: Batch, tolerance: float) -> Iterator[Check]:
    expected, counts = module.start_sums(part), {"tokens": part.num_tokens, **module.counts(part)}
    if not expected:
        return
    found = call_outside_step(module, module.compute, part).losses
    for name, denominator, _ in module.terms:
        if name in expected:
            count = counts[denominator] or 1.0
            mean = expected[name] / count
            yield Check(
                name,
                float(found[name]) / count,
                mean,
                tolerance * max(1.0, abs(mean)),
                f"The loss does not begin at its known value: {name}.",
                "use --model.dtype=float32",
            )


def _largest(differences: Tensor) -> float:
    """Returns the largest absolute value; 0 without values, and NaN if one is."""
    return float(differences.abs().max()) if differences.numel() else 0.0


def _distance(check: Check) -> float:
    distance = abs(check.measured - check.expected)
    return math.inf if math.isnan(distance) else distance
