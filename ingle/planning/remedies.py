"""What to type instead when a run does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from ingle.config.adapter import LoraAdapter, LowRankAdapter
from ingle.config.base import base_section
from ingle.config.run import Run
from ingle.planning.memory import memory_bytes
from ingle.planning.shape import ModelShape
from ingle.wording import size

#: The smallest rank that is proposed.
_LEAST_RANK = 8
#: What does not make a run fit must save this share of it to be proposed all the same.
_WORTHWHILE = 0.05


def find_remedy(
    run: Run,
    model: ModelShape,
    longest: int,
    micro_batch: int,
    *,
    free_bytes: int,
    dtype_bytes: int,
    on_gpu: bool,
    compiles_kernels: bool = False,
) -> str:
    """The changes of one option each that make a run fit; where there is none, those that save most.

    Args:
        run: The run.
        model: Its model.
        longest: Tokens of the longest sequence.
        micro_batch: Sequences at once.
        free_bytes: Memory that is free.
        dtype_bytes: Bytes of the compute dtype.
        on_gpu: Whether the device is a GPU.
        compiles_kernels: Whether the CPU's kernels are yet to be compiled on this machine.
    """

    def total(changed: Run, sequences: int) -> int:
        parts = memory_bytes(
            changed, model, sequences * longest, dtype_bytes, on_gpu=on_gpu, compiles_kernels=compiles_kernels
        )
        return sum(parts.values())

    totals = {flag: total(changed, sequences) for flag, changed, sequences in _changes(run, micro_batch)}
    fitting = {flag: needed for flag, needed in totals.items() if needed <= free_bytes}
    if fitting:
        ranks = [flag for flag in fitting if flag.startswith("--adapter.rank=")]
        return "   or   ".join(f"{flag} ({size(fitting[flag])})" for flag in fitting if flag not in ranks[1:])
    enough = total(run, micro_batch) * (1 - _WORTHWHILE)
    saving = sorted((needed, flag) for flag, needed in totals.items() if needed <= enough)
    if not saving:
        return "a smaller model or a shorter data.max_seq_len"
    return "none of these is enough alone: " + "   ".join(f"{flag} ({size(needed)})" for needed, flag in saving[:3])


def _changes(run: Run, micro_batch: int) -> Iterator[tuple[str, Run, int]]:
    """Flags, what the run is with each, and its sequences at once."""
    adapter, train = run.adapter, run.train
    if micro_batch > 1:
        yield "--train.micro_batch_size=1", run, 1
    if not train.recompute:
        lighter = train.model_copy(update={"recompute": True})
        yield "--train.recompute=true", run.model_copy(update={"train": lighter}), micro_batch
    if adapter.kind == "none":
        yield "--adapter.kind=lora", run.model_copy(update={"adapter": LoraAdapter(kind="lora")}), micro_batch
    elif run.base.format == "none":
        yield "--base.format=nf4", run.model_copy(update={"base": base_section("nf4")}), micro_batch
    if isinstance(adapter, LowRankAdapter):
        rank = adapter.rank // 2
        while rank >= _LEAST_RANK:
            narrower = adapter.model_copy(update={"rank": rank})
            yield f"--adapter.rank={rank}", run.model_copy(update={"adapter": narrower}), micro_batch
            rank //= 2
