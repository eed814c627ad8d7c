"""The plan: steps, bytes and floating-point operations of a run, before any are spent."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ingle.config.run import Run
from ingle.errors import ConfigError, DoesNotFit
from ingle.planning.memory import memory_bytes, trainable_parameters
from ingle.planning.remedies import default_batch, find_remedy
from ingle.planning.shape import DataShape, ModelShape
from ingle.wording import size

#: Steps of a run; what ``train.num_steps`` takes.
_MOST_STEPS = 1_000_000_000
#: Bytes that a tokenized token of a batch takes: ids, targets, positions, document numbers.
_BATCH_BYTES_PER_TOKEN = 32
#: Operations per second that ``compile: auto`` assumes.
_ORDINARY_SPEED = {"cpu": 1e12, "gpu": 1e14}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do and need.

    Attributes:
        num_steps: Optimizer steps.
        global_batch_size: Sequences per step.
        micro_batch_size: Sequences per forward pass.
        grad_accum_steps: Forward passes per step.
        tokens_per_step: Tokens read per step, on average.
        num_tokens: Tokens the whole run reads.
        num_epochs: Passes over the data.
        save_every: Steps between checkpoints, 0 for only the last.
        compile: Whether decoder layers are compiled.
        trainable_parameters: Parameters that are trained.
        num_parameters: Parameters of the model, adapters left out.
        flops_per_token: Floating-point operations of forward and backward per token, attention left out.
        memory: Predicted bytes by purpose; ``total`` is their sum.
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

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self)


def make_plan(
    run: Run,
    model: ModelShape,
    data: DataShape,
    *,
    dtype_bytes: int,
    process_bytes: int,
    free_bytes: int,
    can_compile: bool,
    on_gpu: bool = False,
    compiles_kernels: bool = False,
) -> Plan:
    """Counts what ``run`` needs.

    Args:
        run: The run.
        model: Its model.
        data: Its data.
        dtype_bytes: Bytes of the compute dtype.
        process_bytes: What the process holds already (libraries, tokenized data).
        free_bytes: Memory that is free on the device.
        can_compile: Whether compiled layers would run here.
        on_gpu: Whether the device is a GPU.
        compiles_kernels: Whether the CPU's kernels are yet to be compiled on this machine.

    Raises:
        ConfigError: When the epochs make more steps than any run can.
        DoesNotFit: When the prediction exceeds what is free, with the cheapest way out.
    """
    global_batch = run.train.global_batch_size
    micro_batch = run.train.micro_batch_size or default_micro_batch(global_batch, data.longest)
    num_steps = run.train.num_steps or math.ceil(run.train.num_epochs * data.num_sequences / global_batch)
    if num_steps > _MOST_STEPS:
        raise ConfigError(
            f"The run would make {num_steps:.3g} steps.",
            where=f"train.num_epochs = {run.train.num_epochs}",
            why=f"{data.num_sequences:,} sequences in steps of {global_batch:,}",
            fix="use a smaller --train.num_epochs, or --train.num_steps",
        )
    tokens_per_step = data.num_tokens / data.num_sequences * global_batch
    num_tokens = round(tokens_per_step * num_steps)
    flops = flops_per_token(run, model)
    memory = memory_bytes(
        run, model, micro_batch * data.longest, dtype_bytes, on_gpu=on_gpu, compiles_kernels=compiles_kernels
    )
    memory["batch"] = round(tokens_per_step * _BATCH_BYTES_PER_TOKEN)  # all micro-batches of a step are made at once
    memory["process"] = process_bytes
    memory["total"] = sum(memory.values())
    plan = Plan(
        num_steps=num_steps,
        global_batch_size=global_batch,
        micro_batch_size=micro_batch,
        grad_accum_steps=math.ceil(global_batch / micro_batch),
        tokens_per_step=tokens_per_step,
        num_tokens=num_tokens,
        num_epochs=num_steps * global_batch / data.num_sequences,
        save_every=run.train.save_every if run.train.save_every is not None else max(1, math.ceil(num_steps / 10)),
        compile=decide_compile(run, flops * num_tokens, on_gpu=on_gpu) and can_compile,
        trainable_parameters=trainable_parameters(run, model),
        num_parameters=model.num_parameters,
        flops_per_token=flops,
        memory=memory,
    )
    needed = memory["total"] - process_bytes
    if needed > free_bytes:
        parts = sorted(memory.items(), key=lambda part: -part[1])
        raise DoesNotFit(
            f"This run needs {size(needed)} more than is in use; {size(free_bytes)} are free.",
            where=f"data.max_seq_len = {run.data.max_seq_len}, train.micro_batch_size = {micro_batch}, "
            f"train.global_batch_size = {global_batch}",
            why=" · ".join(f"{name} {size(part)}" for name, part in parts if part and name not in ("total", "process")),
            fix=f"--train.global_batch_size={default_batch(data.num_sequences)}"
            if memory["batch"] > needed / 2
            else find_remedy(
                run,
                model,
                data.longest,
                micro_batch,
                free_bytes=free_bytes,
                dtype_bytes=dtype_bytes,
                on_gpu=on_gpu,
                compiles_kernels=compiles_kernels,
            ),
        )
    return plan


def default_micro_batch(global_batch: int, longest: int) -> int:
    """The largest divisor of the global batch, at most 8, whose rows stay within 4,096 tokens (at least one)."""
    fitting = [size for size in range(1, min(8, global_batch) + 1) if global_batch % size == 0]
    return max((size for size in fitting if size * longest <= 4096), default=1)


def flops_per_token(run: Run, model: ModelShape) -> float:
    """Operations per token: 2 a weight forward, 2 for the input's gradient, 2 more for that of a trained weight."""
    per_weight = 6 if run.adapter.kind == "none" else 4
    per_weight += 2 if run.train.recompute else 0
    linear = sum(lin.num_weights * lin.active for lin in model.linears) + model.hidden_size * model.vocab_size
    return float(per_weight * linear + 6 * (trainable_parameters(run, model) if run.adapter.kind != "none" else 0))


def decide_compile(run: Run, total_flops: float, *, on_gpu: bool) -> bool:
    """Whether compiling decoder layers pays for itself within the run.

    A pure function of the config and the model, never of a measured speed: a run that is resumed after a crash must
    compute with the same kernels, or its weights would differ in the last bit.  ``auto`` compiles runs of more than
    half an hour on a device of ordinary speed, so that the minutes that compiling may take are a small part of them.
    """
    if run.train.compile != "auto":
        return bool(run.train.compile)
    return total_flops > _ORDINARY_SPEED["gpu" if on_gpu else "cpu"] * 1800
