"""Proposes changes for a run that does not fit or would learn little."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ingle.config.adapter import LoraAdapter, LowRankAdapter
from ingle.config.adapter_kinds import PrefixAdapter, PromptAdapter
from ingle.config.base import base_section
from ingle.config.objective import rows_of
from ingle.config.policy import Sampled
from ingle.config.run import Run
from ingle.planning.search import Option, Problem, choose, search
from ingle.wording import size

#: The smallest rank to propose.
_LEAST_RANK = 8
#: A change that does not make a run fit must save this share of its memory to be proposed.
_WORTHWHILE = 0.05
#: The shortest sequence to propose, in tokens, and the fewest answers that grow together.
_LEAST_LENGTH, _LEAST_SLOTS = 256, 8
#: A run of fewer steps hardly gets beyond the warm-up.
_FEW_STEPS = 10
#: Steps to propose instead.
_ENOUGH_STEPS = 20


def default_batch(num_sequences: float) -> int:
    """Returns the largest power of two, at most 16, that splits ``num_sequences`` into about 20 steps or more."""
    return int(min(16, 2 ** math.floor(math.log2(max(1.0, num_sequences / _ENOUGH_STEPS)))))


def find_better_batch(run: Run, num_sequences: int, num_steps: int) -> str | None:
    """Returns a warning, with flags that help, if a batch is too large for little data; None if it is fine.

    Args:
        run: The run.
        num_sequences: Sequences in its data.
        num_steps: Its steps.
    """
    train = run.train
    batch = train.global_batch_size
    num_epochs = num_steps * batch / num_sequences
    has = f"the data has {num_sequences:,}" + (
        f" (packed to {run.data.max_seq_len:,} tokens each)" if run.data.packing else ""
    )
    if train.num_steps is not None:
        if batch <= num_sequences:
            return None
        problem = f"A step takes {batch:,} sequences, but {has}: each step reads the data more than once."
    elif num_epochs >= 1.5 * train.num_epochs:
        problem = (
            f"A step takes {batch:,} sequences and {has}, so the data is read {num_epochs:.3g} times instead of "
            f"{train.num_epochs:.3g}."
        )
    elif num_steps < _FEW_STEPS:
        steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
        problem = f"The run makes only {steps}: a step takes {batch:,} sequences and {has}."
    else:
        return None
    wanted = default_batch(num_sequences * (train.num_epochs if train.num_steps is None else 1))
    flags = [f"--train.global_batch_size={wanted}"] if wanted < batch else []
    if isinstance(train.micro_batch_size, int) and wanted % train.micro_batch_size:
        flags.append(f"--train.micro_batch_size={math.gcd(wanted, train.micro_batch_size)}")
    epochs = math.ceil(_ENOUGH_STEPS * wanted / num_sequences)
    if train.num_steps is None and epochs > train.num_epochs:
        flags.append(f"--train.num_epochs={epochs}")
    return f"{problem} Try {' '.join(flags)}." if flags else None


def find_remedy(problem: Problem, least: Option) -> str:
    """Returns changes that make a run fit; if none does, those that save most.

    Args:
        problem: The run and its devices.
        least: The strategy that needs the least memory.
    """
    found = {flag: _least(changed) for flag, changed in changes(problem)}
    fitting = {flag: option for flag, option in found.items() if option.fits}
    if fitting:
        ranks = [flag for flag in fitting if flag.startswith("--adapter.rank=")]
        return "   or   ".join(
            f"{flag} ({size(option.memory.total_bytes)})" for flag, option in fitting.items() if flag not in ranks[1:]
        )
    enough = least.memory.total_bytes * (1 - _WORTHWHILE)
    saving = sorted((option.memory.total_bytes, flag) for flag, option in found.items())
    saving = [(needed, flag) for needed, flag in saving if needed <= enough]
    if not saving:
        return "use a smaller model or a shorter data.max_seq_len"
    return "none of these is enough on its own: " + "   ".join(
        f"{flag} ({size(needed)})" for needed, flag in saving[:3]
    )


def _least(problem: Problem) -> Option:
    """Returns the fastest strategy that fits, or else the one that needs the least memory."""
    options = search(problem)
    return choose(options) or min(options, key=lambda option: option.memory.total_bytes)


def changes(problem: Problem) -> Iterator[tuple[str, Problem]]:
    """Yields flags, and the problem with each of them: the options that the config fixes, then the model's."""
    run, data = problem.run, problem.data
    parallel = run.parallel

    def with_run(**sections: Any) -> Problem:
        return replace(problem, run=run.model_copy(update=sections))

    if isinstance(run.train.micro_batch_size, int) and run.train.micro_batch_size > 1:
        yield (
            "--train.micro_batch_size=auto",
            with_run(train=run.train.model_copy(update={"micro_batch_size": "auto"})),
        )
    for name, value in (("recompute", True), ("offload", True)):
        possible = name == "recompute" or (problem.device.on_gpu and run.adapter.kind != "none")
        if getattr(parallel, name) is False and possible:
            yield f"--parallel.{name}=true", with_run(parallel=parallel.model_copy(update={name: value}))
    if problem.world_size > 1 and parallel.kind not in ("auto", "zero3", "fsdp"):
        yield "--parallel.kind=fsdp", with_run(parallel=parallel.model_copy(update={"kind": "fsdp"}))
    if run.adapter.kind == "none":
        yield "--adapter.kind=lora", with_lora(problem)
    elif run.base.format == "none":
        yield with_format(problem, "nf4")
    if isinstance(run.adapter, LowRankAdapter):
        rank = run.adapter.rank // 2
        while rank >= _LEAST_RANK:
            yield f"--adapter.rank={rank}", with_run(adapter=run.adapter.model_copy(update={"rank": rank}))
            rank //= 2
    if isinstance(run.adapter, PrefixAdapter | PromptAdapter) and (number := run.adapter.num_virtual_tokens // 2):
        fewer = run.adapter.model_copy(update={"num_virtual_tokens": number})
        yield f"--adapter.num_virtual_tokens={number}", with_run(adapter=fewer)
    objective = rows_of(run.objective)
    if isinstance(objective, Sampled) and objective.rollout.num_slots > _LEAST_SLOTS:
        rollout = objective.rollout.model_copy(update={"num_slots": _LEAST_SLOTS})
        yield (
            f"--objective.rollout.num_slots={_LEAST_SLOTS}",
            with_run(objective=objective.model_copy(update={"rollout": rollout})),
        )
    length = data.longest // 2
    while length >= _LEAST_LENGTH:
        document, prompt = min(data.longest_document, length), min(data.shared_prompt, length)
        shorter = replace(data, longest=length, longest_document=document, shared_prompt=prompt)
        yield f"--data.max_seq_len={length}", replace(problem, data=shorter)
        length //= 2


def with_lora(problem: Problem) -> Problem:
    """Returns a problem of full fine-tuning with LoRA on every linear layer of the layers instead."""
    layers = tuple(
        replace(layer, linears=tuple(replace(lin, adapted=int(lin.count == 1)) for lin in layer.linears))
        for layer in problem.shape.layers
    )
    run = problem.run.model_copy(update={"adapter": LoraAdapter()})
    return replace(problem, run=run, shape=replace(problem.shape, layers=layers, saved_parameters=0))


def with_format(problem: Problem, name: str) -> tuple[str, Problem]:
    """Returns the flag of another format of the base, and the problem with it."""
    layers = tuple(
        replace(layer, linears=tuple(replace(lin, bits_per_weight=None) for lin in layer.linears))
        for layer in problem.shape.layers
    )
    run = problem.run.model_copy(update={"base": base_section(name)})
    return f"--base.format={name}", replace(problem, run=run, shape=replace(problem.shape, layers=layers))
