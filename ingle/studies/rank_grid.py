"""What ``ingle rank`` is asked for, which trials that means, and how long they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ingle import flow
from ingle.config.adapter import LoraAdapter
from ingle.config.run import Run
from ingle.errors import ConfigError
from ingle.events import Sink, Warned
from ingle.planning import Plan
from ingle.studies.trials import Trial, Trials, require_new_adapters, shared_options
from ingle.wording import duration, plural

#: Seconds of a trial beyond its plan: assembling a model and a folder.
_START_S = 5.0
_SMALLEST_DIM = 16


@dataclass(frozen=True)
class RankRequest:
    """The options of ``ingle rank``.

    Attributes:
        run: The config; its ``output`` is the folder of the study.
        space: Subspaces of LoRA, or of all weights.
        methods: ``did``, ``said`` or both; the first one decides.
        dims: Dimensions to try; None for powers of 4.
        ranks: Ranks to try; None for powers of 4 up to the config's rank, at least 16.
        num_seeds: Seeds of each configuration; None for 3, or fewer in a small budget.
        num_rates: Learning rates of each configuration; None for 3.
        steps: Steps of a trial; None for those of the config.
        threshold: Share of the gain that counts as reached.
        budget_s: Seconds that the study may take; None for any.
        every_rank: Whether the curve is measured for every rank, instead of the recommended one.
        check_layers: Whether ranks by layer are tried.
    """

    run: Run
    space: Literal["lora", "full"] = "lora"
    methods: tuple[Literal["did", "said"], ...] = ("did",)
    dims: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None
    num_seeds: int | None = None
    num_rates: int | None = None
    steps: int | None = None
    threshold: float = 0.9
    budget_s: float | None = None
    every_rank: bool = False
    check_layers: bool = True

    @property
    def run_lr(self) -> float:
        """The learning rate of the config, the middle of the first grid."""
        lr = self.run.optimizer.lr
        assert lr is not None
        return lr


@dataclass(frozen=True, slots=True)
class Grid:
    """The trials of a study.

    Attributes:
        ranks: Ranks of LoRA, rising.
        dims: Dimensions of subspaces, rising; the study ends early where more add nothing.
        seeds: Seeds of each configuration.
        num_rates: Learning rates of each configuration.
        steps: Steps of a trial.
    """

    ranks: tuple[int, ...]
    dims: tuple[int, ...]
    seeds: tuple[int, ...]
    num_rates: int
    steps: int

    def num_trials(self, request: RankRequest) -> int:
        """Returns the largest number of trials, without extensions of the rates."""
        spaces = len(self.ranks) if request.space == "lora" else 1
        curves = len(request.methods) + (spaces - 1) * request.every_rank
        by_layer = len(self.seeds) * (request.space == "lora" and request.check_layers and len(self.ranks) > 1)
        return (spaces + curves * len(self.dims)) * (self.num_rates + len(self.seeds) - 1) + by_layer


def choose_grid(request: RankRequest, sink: Sink) -> tuple[Grid, float]:
    """Returns the grid of a study that fits its budget, and the predicted time in seconds; says both.

    Raises:
        ConfigError: The config has no subspaces, or even the smallest grid takes longer than the budget.
    """
    run = request.run
    require_new_adapters(run)
    if request.space == "lora" and not isinstance(run.adapter, LoraAdapter):
        raise ConfigError(
            f"The subspaces of LoRA need adapter.kind = lora, not {run.adapter.kind}.",
            where="--space lora",
            fix="--adapter.kind=lora, or --space full",
        )
    first = _grids_of(request, 1)
    plan = _plan(request, next(first), sink)
    steps = request.steps or plan.num_steps
    grids = [replace(grid, steps=steps) for grid in _grids_of(request, plan.trainable_parameters)]
    each_s = plan.hours * 3600 * steps / plan.num_steps + _START_S
    for grid in grids:
        seconds = grid.num_trials(request) * each_s
        if request.budget_s is None or seconds <= request.budget_s:
            sink(Warned(_announcement(request, grid, seconds, each_s, is_reduced=grid is not grids[0])))
            return grid, seconds
    raise ConfigError(
        f"The smallest study takes about {duration(seconds)}; the budget is {duration(request.budget_s or 0)}.",
        where="--budget",
        why=f"{plural(grids[-1].num_trials(request), 'trial')} of about {duration(each_s)}",
        fix="a smaller --steps, or a larger --budget",
    )


def _plan(request: RankRequest, grid: Grid, sink: Sink) -> Plan:
    """Returns the plan of the largest trial."""
    options = (
        {"adapter": {"kind": "lora", "rank": grid.ranks[-1]}}
        if request.space == "lora"
        else {"adapter": {"kind": "none"}}
    )
    shared = shared_options(request.run, request.steps or request.run.train.num_steps)
    trial = Trial("plan", options, request.run_lr, grid.seeds[0])
    return flow.plan(Trials(request.run, shared, sink).run_of(trial), sink)


def _grids_of(request: RankRequest, parameters: int) -> Iterator[Grid]:
    """Yields grids from the one that is asked for to the smallest; what the request names stays."""
    seed = request.run.seed
    top = max(16, getattr(request.run.adapter, "rank", 16))
    ranks = tuple(sorted({1, *(4**power for power in range(1, 9) if 4**power < top), top}))
    dims = tuple(dim for dim in (_SMALLEST_DIM * 4**power for power in range(12)) if dim < max(parameters, 17))
    for num_seeds, rank_step, dim_step in ((3, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (1, 2, 2)):
        count = request.num_seeds or num_seeds
        yield Grid(
            ranks=request.ranks or (*ranks[:-1][::-rank_step][::-1], ranks[-1]),
            dims=request.dims or dims[::dim_step],
            seeds=tuple(range(seed, seed + count)),
            num_rates=request.num_rates or 3,
            steps=1,
        )


def _announcement(request: RankRequest, grid: Grid, seconds: float, each_s: float, *, is_reduced: bool) -> str:
    names = f"ranks {', '.join(map(str, grid.ranks))}" if request.space == "lora" else "full fine-tuning"
    reduced = " The grid was reduced to fit the budget." if is_reduced else ""
    return (
        f"Up to {plural(grid.num_trials(request), 'trial')} of {plural(grid.steps, 'step')}, about {duration(seconds)} "
        f"({duration(each_s)} each): {names}; dimensions up to {grid.dims[-1]:,}; {plural(len(grid.seeds), 'seed')}; "
        f"{plural(grid.num_rates, 'learning rate')}.{reduced}"
    )
