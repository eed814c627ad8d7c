"""The plan: steps, bytes and floating-point operations of a run, before any are spent.

Weights, adapters, gradients and optimizer state are counted exactly from the skeleton.  Activations are an
estimate: the inputs and outputs of every linear map on the path of a token, which is what the fused layers
and the nonlinearities between them keep for backward.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ingle.config.adapter import LoraAdapter, QaLoraAdapter
from ingle.config.base import HqqBase, base_section
from ingle.config.run import Run
from ingle.errors import DoesNotFit
from ingle.planning.shape import DataShape, ModelShape

#: Logits held at once by the chunked loss, and bytes a logit takes there (bf16 product and float32 softmax).
_LOSS_CHUNK_LOGITS = 1 << 24
_LOSS_BYTES_PER_LOGIT = 8

#: What a CPU run loads after it is planned: the kernels, half way between a run that finds them compiled and one that
#: compiles them; with bfloat16 also the matrix products that oneDNN compiles for each shape and keeps.  Measured, and
#: much the same for every model.
_CPU_KERNEL_BYTES = 60 << 20
_CPU_PRIMITIVE_BYTES = 130 << 20

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

    Raises:
        DoesNotFit: When the prediction exceeds what is free, with the cheapest way out.
    """
    global_batch = run.train.global_batch_size
    micro_batch = run.train.micro_batch_size or default_micro_batch(global_batch, data.longest)
    num_steps = run.train.num_steps or math.ceil(run.train.num_epochs * data.num_sequences / global_batch)
    tokens_per_step = data.num_tokens / data.num_sequences * global_batch
    num_tokens = round(tokens_per_step * num_steps)
    flops = flops_per_token(run, model)
    memory = memory_bytes(run, model, micro_batch * data.longest, dtype_bytes, on_gpu=on_gpu)
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
        raise DoesNotFit(
            f"this run needs {_gib(needed)} beside what is in use; {_gib(free_bytes)} are free.",
            where=f"data.max_seq_len = {run.data.max_seq_len}, train.micro_batch_size = {micro_batch}",
            why=" · ".join(f"{name} {_gib(size)}" for name, size in memory.items() if name not in ("total", "process")),
            fix=_remedy(run, model, data, micro_batch, dtype_bytes, on_gpu),
        )
    return plan


def default_micro_batch(global_batch: int, longest: int) -> int:
    """The largest divisor of the global batch, at most 8, whose rows stay within 4,096 tokens (at least one)."""
    fitting = [size for size in range(1, min(8, global_batch) + 1) if global_batch % size == 0]
    return max((size for size in fitting if size * longest <= 4096), default=1)


def trainable_parameters(run: Run, model: ModelShape) -> int:
    """Parameters that are trained."""
    if run.adapter.kind == "none":
        return model.num_parameters
    rank, size = run.adapter.rank, _group_size(run)
    columns = sum((math.ceil(lin.in_features / size) + lin.out_features) * lin.adapted for lin in model.linears)
    return model.trained_whole + rank * columns


def _group_size(run: Run) -> int:
    """Inputs that share a column of A."""
    if not isinstance(run.adapter, QaLoraAdapter):
        return 1
    base = run.base
    return base.group_size if isinstance(base, HqqBase) else 32  # GGUF's formats with an offset


def flops_per_token(run: Run, model: ModelShape) -> float:
    """Operations per token: 2 a weight forward, 2 for the input's gradient, 2 more for that of a trained weight."""
    per_weight = 6 if run.adapter.kind == "none" else 4
    per_weight += 2 if run.train.recompute else 0
    linear = sum(lin.num_weights * lin.active for lin in model.linears) + model.hidden_size * model.vocab_size
    return float(per_weight * linear + 6 * (trainable_parameters(run, model) if run.adapter.kind != "none" else 0))


def memory_bytes(
    run: Run, model: ModelShape, row_tokens: int, dtype_bytes: int, *, on_gpu: bool = False
) -> dict[str, int]:
    """Predicted bytes by purpose, for rows of ``row_tokens`` tokens."""
    weights = sum(
        lin.num_weights
        * lin.count
        * (lin.bits_per_weight or run.base.bits_per_weight(lin.in_features, dtype_bits=8 * dtype_bytes))
        / 8
        for lin in model.linears
    )
    trained = trainable_parameters(run, model)
    full = run.adapter.kind == "none"
    whole = trained if full else model.trained_whole
    copies = (4 if dtype_bytes < 4 else 0) + (0 if full else dtype_bytes)  # float32 masters; what the base answers with
    widths = sum((lin.in_features + lin.out_features) * lin.active for lin in model.linears)
    kept = model.num_layers * model.hidden_size + widths / model.num_layers if run.train.recompute else widths
    largest = max((lin.num_weights for lin in model.linears), default=0)
    is_packed = run.base.format != "none" or any(lin.bits_per_weight is not None for lin in model.linears)
    decoded = largest * dtype_bytes if is_packed else 0
    logits = min(row_tokens * model.vocab_size, _LOSS_CHUNK_LOGITS) * _LOSS_BYTES_PER_LOGIT
    return {
        "weights": round(weights) + model.other_parameters * dtype_bytes,
        "merged weights": _merged_bytes(run, model),
        "trainable": 4 * (trained - whole) + copies * whole,
        "gradients": trained * 4,
        "optimizer": trained * 8,
        "activations": round(row_tokens * kept * dtype_bytes),
        "decoded weights": decoded,
        "loss": logits,
        "kernels": 0 if on_gpu else _kernel_bytes(dtype_bytes),
    }


def _merged_bytes(run: Run, model: ModelShape) -> int:
    """Packed merged weights beside the base, in runs that train through the rounding of their merge."""
    adapter = run.adapter
    if isinstance(adapter, LoraAdapter) and adapter.merge_aware is not None:
        named = adapter.merge_aware.format
    elif isinstance(adapter, QaLoraAdapter) and adapter.train_rounding:
        named = None
    else:
        return 0
    target = run.base if named is None else base_section(named)
    bits = sum(lin.num_weights * lin.adapted * target.bits_per_weight(lin.in_features) for lin in model.linears)
    return round(bits / 8)


def _kernel_bytes(dtype_bytes: int) -> int:
    """What compiled kernels and their compiler take in the memory of a CPU run."""
    return _CPU_KERNEL_BYTES + (_CPU_PRIMITIVE_BYTES if dtype_bytes == 2 else 0)


def decide_compile(run: Run, total_flops: float, *, on_gpu: bool) -> bool:
    """Whether compiling decoder layers pays for itself within the run.

    A pure function of the config and the model, never of a measured speed: a run that goes on after a crash must
    compute with the same kernels, or its weights would differ in the last bit.  ``auto`` compiles runs of more than
    half an hour on a device of ordinary speed, so that the minutes that compiling may take are a small part of them.
    """
    if run.train.compile != "auto":
        return bool(run.train.compile)
    return total_flops > _ORDINARY_SPEED["gpu" if on_gpu else "cpu"] * 1800


def _remedy(run: Run, model: ModelShape, data: DataShape, micro_batch: int, dtype_bytes: int, on_gpu: bool) -> str:
    options = []
    if micro_batch > 1:
        total = sum(memory_bytes(run, model, data.longest, dtype_bytes, on_gpu=on_gpu).values())
        options.append(f"--train.micro_batch_size=1 ({_gib(total)})")
    if not run.train.recompute:
        lighter = run.model_copy(update={"train": run.train.model_copy(update={"recompute": True})})
        total = sum(memory_bytes(lighter, model, data.longest * micro_batch, dtype_bytes, on_gpu=on_gpu).values())
        options.append(f"--train.recompute=true ({_gib(total)})")
    if run.base.format == "none" and run.adapter.kind != "none":
        options.append("--base.format=nf4")
    if run.adapter.kind == "none":
        options.append("--adapter.kind=lora")
    return "   or   ".join(options) or "a smaller model or a shorter data.max_seq_len"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
