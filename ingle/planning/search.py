"""Searches the strategies of a run: which fit on its devices, and which of those is fastest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

from ingle.config.run import Run
from ingle.planning.cost import Cost, Work, predict
from ingle.planning.devices import Device
from ingle.planning.memory import MemoryParts, per_device
from ingle.planning.shape import DataShape, ModelShape
from ingle.planning.strategy import Strategy, StrategyKind

#: Share of a GPU's memory to leave free: an allocator that has to search for gaps makes a full GPU slow.
HEADROOM = 0.05
#: Host memory that is assumed for devices that are not present, in addition to as much as they have.
_HOST_BYTES = 16 << 30
#: Of strategies whose speed differs by less, the simplest with the smallest micro-batch is chosen.
_EQUAL_SPEED = 0.05
#: Kinds from the simplest on; the search compares these, and ``hsdp`` over several machines.
_KINDS: tuple[StrategyKind, ...] = ("none", "ddp", "zero1", "zero2", "zero3", "hsdp")
#: Tokens of a micro-batch beyond which no device gets faster. A CPU's caches are too small for more than a few.
_MOST_TOKENS = {True: 65_536, False: 4_096}
_MOST_SEQUENCES = 256
#: Sequences of a micro-batch on a CPU if the memory suffices.
_CPU_SEQUENCES = 8


@dataclass(frozen=True)
class Problem:
    """A run and the devices that it shall use.

    Attributes:
        run: The run; what its config fixes is not searched.
        shape: Its model.
        data: Its data.
        device: The device of each rank.
        free_bytes: Free memory of a device.
        dtype_bytes: Bytes of the compute dtype.
        world_size: Ranks.
        local_world_size: Ranks on each machine.
        compiles_kernels: Whether this machine has yet to compile the CPU kernels.
        free_host_bytes: Free host memory of a machine; None assumes 16 GiB more than its devices have.
    """

    run: Run
    shape: ModelShape
    data: DataShape
    device: Device
    free_bytes: int
    dtype_bytes: int
    world_size: int = 1
    local_world_size: int = 1
    compiles_kernels: bool = False
    free_host_bytes: int | None = None

    @cached_property
    def work(self) -> Work:
        """What the run computes and moves."""
        return Work.of(self.run, self.shape, self.data, self.dtype_bytes)

    @property
    def usable_bytes(self) -> float:
        """Memory that a strategy may use."""
        return self.free_bytes * (1 - HEADROOM if self.device.on_gpu else 1)

    @property
    def usable_host_bytes(self) -> float:
        """Host memory of a machine that a strategy may use."""
        if self.free_host_bytes is not None:
            return self.free_host_bytes
        return _HOST_BYTES + self.device.memory_bytes * self.local_world_size


@dataclass(frozen=True, slots=True)
class Option:
    """A strategy with its predicted memory and time.

    Attributes:
        strategy: The strategy.
        memory: Bytes of each device.
        cost: Time of a step.
        limit: The memory that is too small for it, that of the device or of the host; None if it fits.
        tokens_per_s: Tokens per second of all ranks.
        host_activation_bytes: Activations of a rank in host memory.
    """

    strategy: Strategy
    memory: MemoryParts
    cost: Cost
    limit: Literal["device", "host"] | None
    tokens_per_s: float
    host_activation_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether device and host have enough memory for it."""
        return self.limit is None

    @property
    def complexity(self) -> tuple[bool, bool, bool, int, int]:
        """Orders strategies of equal speed: fewer tricks first, then the smaller micro-batch."""
        strategy = self.strategy
        return (
            strategy.offload,
            strategy.offload_activations,
            strategy.recompute,
            _KINDS.index(strategy.kind),
            strategy.micro_batch_size,
        )


def search(problem: Problem) -> list[Option]:
    """Returns every strategy that the config allows."""
    sizes: dict[Strategy, MemoryParts] = {}
    return [evaluate(problem, strategy, sizes) for strategy in strategies(problem)]


def evaluate(problem: Problem, strategy: Strategy, sizes: dict[Strategy, MemoryParts] | None = None) -> Option:
    """Predicts memory and time of a strategy.

    Args:
        problem: The run and its devices.
        strategy: The strategy.
        sizes: Bytes of strategies that are known, which the call adds to.
    """
    sizes = {} if sizes is None else sizes
    memory = _memory(problem, strategy, sizes)
    saved = 0
    if strategy.offload_activations:
        kept = _memory(problem, replace(strategy, offload_activations=False), sizes)
        saved = max(0, kept.activation_bytes - memory.activation_bytes)
    cost = predict(problem.work, strategy, problem.device, saved, local_world_size=problem.local_world_size)
    tokens = problem.work.tokens * problem.run.train.global_batch_size
    limit: Literal["device", "host"] | None = None
    if memory.total_bytes > problem.usable_bytes:
        limit = "device"
    elif problem.device.on_gpu and offloaded_bytes(problem, strategy, saved) > problem.usable_host_bytes:
        limit = "host"
    return Option(strategy, memory, cost, limit, tokens / cost.step_s, saved)


def offloaded_bytes(problem: Problem, strategy: Strategy, activation_bytes: int) -> float:
    """Returns what a machine keeps in host memory for its devices.

    Args:
        problem: The run and its devices.
        strategy: The strategy.
        activation_bytes: Activations of a rank in host memory.
    """
    ranks = problem.local_world_size
    copies = (ranks / strategy.shard_size if strategy.shards_base else ranks) if strategy.offload else 0
    return problem.work.base_bytes * copies + activation_bytes * ranks


def choose(options: Iterable[Option]) -> Option | None:
    """Returns the fastest strategy that fits; of those within 5 % of it, the simplest. None if none fits."""
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None
    best = max(option.tokens_per_s for option in fitting)
    return min(
        (option for option in fitting if option.tokens_per_s >= (1 - _EQUAL_SPEED) * best),
        key=lambda option: option.complexity,
    )


def representatives(options: Iterable[Option]) -> list[Option]:
    """Returns the best option of each way to share memory: fitting and fastest first, then by their bytes."""
    groups: dict[tuple[object, ...], list[Option]] = {}
    for option in options:
        strategy = option.strategy
        key = (strategy.kind, strategy.recompute, strategy.offload, strategy.offload_activations)
        groups.setdefault(key, []).append(option)
    best = [choose(group) or min(group, key=lambda option: option.memory.total_bytes) for group in groups.values()]
    return sorted(
        best,
        key=lambda option: (
            not option.fits,
            -option.tokens_per_s if option.fits else option.memory.total_bytes,
        ),
    )


def strategies(problem: Problem) -> Iterator[Strategy]:
    """Yields the strategies that the config allows, with every size of micro-batch worth trying."""
    parallel, run = problem.run.parallel, problem.run
    is_frozen = run.adapter.kind != "none"
    may_offload = problem.device.on_gpu and is_frozen
    for kind, recompute, offload, offload_activations in product(
        kinds(problem),
        _switch(parallel.recompute, True),
        _switch(parallel.offload, may_offload),
        _switch(parallel.offload_activations, problem.device.on_gpu),
    ):
        if offload and kind not in ("zero3", "hsdp") and not (kind == "none" and problem.world_size == 1):
            continue
        if recompute and offload_activations and "auto" in (parallel.recompute, parallel.offload_activations):
            continue  # each of them makes the other pointless
        # One rank that streams its base from host memory does what a rank of zero3 does.
        named: StrategyKind = "zero3" if offload and kind == "none" else kind
        shard_size = problem.world_size
        if kind == "hsdp":
            shard_size = parallel.shard_size or problem.local_world_size
        for size in micro_batch_sizes(problem):
            yield Strategy(
                kind=named,
                world_size=problem.world_size,
                shard_size=shard_size,
                micro_batch_size=size,
                grad_accum_steps=math.ceil(math.ceil(run.train.global_batch_size / size) / problem.world_size),
                recompute=recompute,
                offload=offload,
                offload_activations=offload_activations,
            )


def kinds(problem: Problem) -> tuple[StrategyKind, ...]:
    """Returns the kinds that the config allows."""
    asked = problem.run.parallel.kind
    if problem.world_size == 1:
        return ("none",) if asked in ("auto", "none", "ddp") else (_kind(asked),)
    if asked in ("auto", "none"):
        if problem.run.optim.rule.kind in ("lisa", "subspace"):  # they need all weights on every rank
            return ("ddp",)
        several = problem.world_size > problem.local_world_size
        return ("ddp", "zero1", "zero2", "zero3", *(("hsdp",) if several else ()))
    return (_kind(asked),)


def micro_batch_sizes(problem: Problem) -> tuple[int, ...]:
    """Returns the sizes of micro-batches to try, rising; only that of the config if it names one.

    One process takes divisors of the global batch, so that all its micro-batches are equal. On a CPU, a size below the
    largest with at most 8 sequences and 4,096 tokens is tried only if nothing else fits: see :func:`decide`.
    """
    train = problem.run.train
    if isinstance(train.micro_batch_size, int):
        return (min(train.micro_batch_size, train.global_batch_size),)
    limit = min(math.ceil(train.global_batch_size / problem.world_size), _MOST_SEQUENCES)
    limit = min(limit, max(1, _MOST_TOKENS[problem.device.on_gpu] // max(1, problem.data.longest)))
    if problem.world_size == 1:
        return tuple(size for size in range(1, limit + 1) if train.global_batch_size % size == 0)
    powers = {1 << exponent for exponent in range(limit.bit_length())}
    return tuple(sorted({size for size in (*powers, limit) if size <= limit}))


def decide(problem: Problem, nominal: Device | None = None) -> tuple[Option | None, list[Option]]:
    """Searches and chooses.

    On a CPU the choice depends on the config, the model and the data, and on the machine only where memory is short:
    speeds are those of a nominal CPU, so that a run continues on another machine with the same micro-batches.

    Args:
        problem: The run and its devices.
        nominal: The CPU to compare strategies on.

    Returns:
        The chosen strategy, or None if none fits, and all of them with the speed of the problem's own device.
    """
    options = search(problem)
    if problem.device.on_gpu or nominal is None:
        return choose(options), options
    ranked = search(replace(problem, device=nominal))
    usual = max((size for size in micro_batch_sizes(problem) if size <= _CPU_SEQUENCES), default=1)
    chosen = choose(option for option in ranked if option.strategy.micro_batch_size >= usual) or choose(ranked)
    if chosen is None:
        return None, options
    return next(option for option in options if option.strategy == chosen.strategy), options


def _memory(problem: Problem, strategy: Strategy, sizes: dict[Strategy, MemoryParts]) -> MemoryParts:
    if strategy not in sizes:
        sizes[strategy] = per_device(
            problem.run,
            problem.shape,
            problem.data,
            strategy,
            dtype_bytes=problem.dtype_bytes,
            on_gpu=problem.device.on_gpu,
            compiles_kernels=problem.compiles_kernels,
        )
    return sizes[strategy]


def _switch(value: bool | str, possible: bool) -> tuple[bool, ...]:
    if value == "auto":
        return (False, True) if possible else (False,)
    return (bool(value),)


def _kind(asked: str) -> StrategyKind:
    return "zero3" if asked == "fsdp" else next(kind for kind in _KINDS if kind == asked)
