"""Plans a run: its steps, its strategy, and the bytes, hours and money that it takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ingle.config.objective import rows_of
from ingle.config.policy import Sampled
from ingle.config.policy_rules import num_passes, rows_per_iteration, steps_per_iteration
from ingle.config.run import Run
from ingle.errors import ConfigError, DoesNotFit
from ingle.planning.cost import flops_per_token
from ingle.planning.devices import Device
from ingle.planning.memory import MemoryParts, trainable_parameters
from ingle.planning.remedies import default_batch, find_remedy
from ingle.planning.resources import disk_bytes, host_bytes
from ingle.planning.rollouts import rollout_s, validation_s
from ingle.planning.search import Option, Problem, decide
from ingle.planning.shape import DataShape
from ingle.planning.strategy import Strategy
from ingle.wording import size

#: Upper limit of ``train.num_steps``.
_MOST_STEPS = 1_000_000_000
#: Validations per run if ``evaluate.every`` does not say when.
_NUM_VALIDATIONS = 10
#: Bytes per token of a batch: ids, labels, positions, offsets.
_BATCH_BYTES_PER_TOKEN = 32
#: Operations per second that ``compile: auto`` assumes for an average device.
_TYPICAL_SPEED = {"cpu": 1e12, "gpu": 1e14}
#: Names of the parts of memory in tables.
_PART_NAMES = {
    "weights_bytes": "weights",
    "gather_bytes": "gathers",
    "adapter_bytes": "adapter",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "activation_bytes": "activations",
    "overhead_bytes": "overhead",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted work and memory of a run.

    Attributes:
        num_steps: Optimizer steps.
        global_batch_size: Sequences per step.
        micro_batch_size: Sequences per forward pass.
        grad_accum_steps: Forward passes per step.
        tokens_per_step: Tokens read per step, on average.
        num_tokens: Tokens that the run reads in total.
        num_epochs: Passes over the data.
        save_every: Steps between checkpoints; 0 saves only the last one.
        validate_every: Steps between validations, of which the first is before the first step; 0 for none.
        compile: Whether decoder layers are compiled with ``torch.compile``.
        trainable_parameters: Number of trained parameters.
        num_parameters: Parameters of the model without adapters.
        flops_per_token: Floating-point operations of forward and backward per token, without attention.
        memory: Predicted bytes of a process by purpose; ``total`` is their sum.
        strategy: How the ranks share the run.
        per_device: Predicted bytes on each device.
        host_bytes: Predicted host memory of a machine.
        disk_bytes: Predicted disk space of checkpoints, result and caches.
        device: Name of the device that speed and price are those of.
        tokens_per_s: Predicted tokens per second of all ranks.
        hours: Predicted hours of training and validation, without loading and evaluation.
        validation_hours: The part of ``hours`` that validations take, without answers to the samples of a task.
        rollout_hours: The part of ``hours`` in which answers are sampled and evaluated, without rewards.
        price: Predicted price in US dollars; that of the energy for a device that is not rented.
    """

    num_steps: int
    global_batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    tokens_per_step: float
    num_tokens: int
    num_epochs: float
    save_every: int
    compile: bool
    trainable_parameters: int
    num_parameters: int
    flops_per_token: float
    memory: dict[str, int]
    strategy: Strategy = field(default_factory=Strategy)
    per_device: MemoryParts = field(default_factory=MemoryParts)
    host_bytes: int = 0
    disk_bytes: int = 0
    device: str = ""
    tokens_per_s: float = 0.0
    hours: float = 0.0
    price: float = 0.0
    validate_every: int = 0
    validation_hours: float = 0.0
    rollout_hours: float = 0.0

    def peak_bytes(self, *, on_gpu: bool) -> int:
        """Returns the predicted peak of a process as a run measures it: allocated on a GPU, resident on a CPU."""
        return self.per_device.allocated_bytes(on_gpu=on_gpu) + (0 if on_gpu else self.memory["process"])

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data."""
        return asdict(self)


def make_plan(
    problem: Problem,
    *,
    process_bytes: int = 0,
    can_compile: bool = False,
    nominal: Device | None = None,
) -> Plan:
    """Chooses the strategy of a run and predicts its steps, memory, time and price.

    Args:
        problem: The run and its devices.
        process_bytes: Memory that the process uses already (libraries, tokenized data).
        can_compile: Whether ``torch.compile`` works on the device.
        nominal: The CPU on which strategies are compared; see :func:`ingle.planning.search.decide`.

    Raises:
        ConfigError: The epochs amount to more steps than a run can make.
        DoesNotFit: No strategy that the config allows fits; the error names changes that make the run fit.
    """
    count_steps(problem.run, problem.data)
    chosen, options = decide(problem, nominal)
    if chosen is None:
        raise _does_not_fit(problem, min(options, key=lambda option: option.memory.total_bytes))
    return describe(problem, chosen, process_bytes=process_bytes, can_compile=can_compile)


def describe(problem: Problem, option: Option, *, process_bytes: int = 0, can_compile: bool = False) -> Plan:
    """Returns the plan of a run with a certain strategy, whether it fits or not."""
    run, data, strategy = problem.run, problem.data, option.strategy
    on_gpu = problem.device.on_gpu
    global_batch = run.train.global_batch_size
    num_steps = count_steps(run, data)
    num_tokens = round(problem.work.tokens * global_batch * num_steps)
    flops = flops_per_token(run, problem.shape, recompute=strategy.recompute)
    memory = {_PART_NAMES[name]: number for name, number in option.memory.parts().items()}
    memory["process"] = process_bytes
    memory["total"] = sum(memory.values())
    validate_every = decide_interval(run, num_steps, data)
    validation_hours = 0.0
    if validate_every:
        validation_hours = (num_steps // validate_every + 1) * validation_s(problem, option, flops) / 3600
    rollout_hours = 0.0
    if isinstance(rows_of(run.objective), Sampled):
        iterations = math.ceil(num_steps / steps_per_iteration(run))
        rollout_hours = iterations * rollout_s(problem, option, flops) / 3600
    hours = num_steps * option.cost.step_s / 3600 + validation_hours + rollout_hours
    return Plan(
        num_steps=num_steps,
        global_batch_size=global_batch,
        micro_batch_size=strategy.micro_batch_size,
        grad_accum_steps=strategy.grad_accum_steps,
        tokens_per_step=problem.work.tokens * global_batch,
        num_tokens=num_tokens,
        num_epochs=num_steps * global_batch / (data.num_sequences * num_passes(run)),
        save_every=run.train.save_every if run.train.save_every is not None else max(1, math.ceil(num_steps / 10)),
        compile=decide_compile(run, flops * num_tokens, on_gpu=on_gpu) and can_compile,
        trainable_parameters=trainable_parameters(run, problem.shape),
        num_parameters=problem.shape.num_parameters,
        flops_per_token=flops,
        memory=memory,
        strategy=strategy,
        per_device=option.memory,
        host_bytes=host_bytes(problem, option) + (process_bytes * problem.local_world_size),
        disk_bytes=disk_bytes(problem),
        device=problem.device.name,
        tokens_per_s=option.tokens_per_s,
        hours=hours,
        price=hours * problem.world_size * problem.device.price_per_hour,
        validate_every=validate_every,
        validation_hours=validation_hours,
        rollout_hours=rollout_hours,
    )


def count_steps(run: Run, data: DataShape) -> int:
    """Returns the optimizer steps of a run.

    Raises:
        ConfigError: There are more than a run can make.
    """
    per_step: float = run.train.global_batch_size
    rounded = 1
    objective = rows_of(run.objective)
    if isinstance(objective, Sampled):  # whole iterations, each of which makes several passes over its answers
        rounded = steps_per_iteration(run)
        per_step = rows_per_iteration(objective) / rounded
    wanted = run.train.num_epochs * data.num_sequences / (per_step * rounded)
    num_steps = run.train.num_steps or math.ceil(wanted) * rounded
    if num_steps > _MOST_STEPS:
        raise ConfigError(
            f"The run would make {num_steps:.3g} steps, which is too many.",
            where=f"train.num_epochs = {run.train.num_epochs}",
            why=f"{data.num_sequences:,} sequences in steps of {run.train.global_batch_size:,}",
            fix="use a smaller --train.num_epochs, or --train.num_steps",
        )
    return num_steps


def decide_interval(run: Run, num_steps: int, data: DataShape) -> int:
    """Returns the steps between validations; 0 if the run has no validation data."""
    if run.data.validation is None:
        return 0
    every = None if run.evaluate is None else run.evaluate.every
    if every is None:
        return max(1, math.ceil(num_steps / _NUM_VALIDATIONS))
    if isinstance(every, int):
        return every
    return max(1, round(every * data.num_sequences / run.train.global_batch_size))


def _does_not_fit(problem: Problem, least: Option) -> DoesNotFit:
    """Returns the error for a run that no strategy fits; ``least`` needs the least memory."""
    run, strategy, memory = problem.run, least.strategy, least.memory
    where = f"data.max_seq_len = {run.data.max_seq_len}, train.micro_batch_size = {strategy.micro_batch_size}"
    batch = problem.work.tokens * run.train.global_batch_size / problem.world_size * _BATCH_BYTES_PER_TOKEN
    is_batch = batch > memory.total_bytes / 2
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])
    per = " per device" if problem.world_size > 1 or problem.device.on_gpu else ""
    return DoesNotFit(
        f"This run needs {size(memory.total_bytes)} of additional memory{per}; {size(problem.usable_bytes)} are free.",
        where=f"{where}, train.global_batch_size = {run.train.global_batch_size}" if is_batch else where,
        why=" · ".join(f"{_PART_NAMES[name]} {size(part)}" for name, part in parts if part),
        fix=f"--train.global_batch_size={default_batch(problem.data.num_sequences)}"
        if is_batch
        else find_remedy(problem, least),
    )


def decide_compile(run: Run, total_flops: float, *, on_gpu: bool) -> bool:
    """Decides whether compiling decoder layers saves time.

    The answer depends only on the config and the model, never on a measured speed: a resumed run must use the same
    kernels, or its weights would differ in the last bit. ``auto`` compiles runs that would take more than half an hour
    on a typical device, so that compilation is a small part of them.
    """
    if run.train.compile != "auto":
        return bool(run.train.compile)
    return total_flops > _TYPICAL_SPEED["gpu" if on_gpu else "cpu"] * 1800
