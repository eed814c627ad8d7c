"""``ingle rank``: how many trained parameters a task needs, and which rank of LoRA follows from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ingle.errors import ConfigError
from ingle.events import Progress, Sink, Warned
from ingle.studies.curve import Difference, Dimension, compare, find_dimension, holm, mean_losses
from ingle.studies.layer_ranks import LayerRank, distribute, layer_ranks, read_spectra
from ingle.studies.rank_grid import Grid, RankRequest, choose_grid
from ingle.studies.rates import Choice, best_rate
from ingle.studies.trials import Trial, Trials, shared_options
from ingle.wording import plural

#: Level of the tests.
_LEVEL = 0.05
#: Dimensions beyond the target that are still tried.
_BEYOND = 2


@dataclass(frozen=True, slots=True)
class Point:
    """A dimension of a curve.

    Attributes:
        dim: Number of directions.
        choice: What was measured at its best learning rate.
    """

    dim: int
    choice: Choice

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures."""
        losses = mean_losses(self.choice.tables())
        ended = [score.loss for score in self.choice.tried if score.failure is None]
        return {
            "d": self.dim,
            "lr": self.choice.lr,
            "at_edge": self.choice.at_edge,
            "scores": losses.tolist(),
            "mean": float(losses.mean()),
            "se": float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None,
            "over_rates": {"mean": sum(ended) / len(ended), "low": min(ended), "high": max(ended)},
        }


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses in random subspaces of one space.

    Attributes:
        method: ``did`` or ``said``.
        rank: The rank of the LoRA in whose space the subspaces are; None for all weights.
        points: By rising dimension.
        floor: Loss before the first step.
        ceiling: Loss of unrestricted training in this space.
        d90: The smallest dimension that reaches the target, a share of the way from ``floor`` to ``ceiling``.
    """

    method: Literal["did", "said"]
    rank: int | None
    points: tuple[Point, ...]
    floor: float
    ceiling: float
    d90: Dimension

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures."""
        points = [point.to_dict() for point in self.points]
        ends = {"floor": self.floor, "ceiling": self.ceiling}
        return {"method": self.method, "rank": self.rank, "points": points, **ends, "d90": self.d90.to_dict()}


@dataclass(frozen=True, slots=True)
class RankRow:
    """An unrestricted rank.

    Attributes:
        rank: The rank; None for full fine-tuning.
        parameters: Trained parameters.
        choice: What was measured at its best learning rate.
        difference: How much higher its loss is than that of the best rank.
        p_holm: p-value of that, corrected for all ranks by Holm's method.
    """

    rank: int | None
    parameters: int
    choice: Choice
    difference: Difference
    p_holm: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures."""
        return {
            "rank": self.rank,
            "parameters": self.parameters,
            "score": float(mean_losses(self.choice.tables()).mean()),
            "lr": self.choice.lr,
            "at_edge": self.choice.at_edge,
            "difference": self.difference.value,
            "ci95": list(self.difference.ci95),
            "p_vs_best": self.p_holm,
        }


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The rank to use.

    Attributes:
        rank: The smallest rank that is as good as the best one within a standard error; None for full fine-tuning.
        low: The smallest rank that the data does not tell apart from the best one.
        high: The largest such rank.
        lr: The learning rate that was best for it.
        rank_pattern: Ranks by layer, if they were measured to be better than one rank for all; empty otherwise.
        reason: Why, in sentences.
    """

    rank: int | None
    low: int | None
    high: int | None
    lr: float
    reason: str
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the recommendation with the options that it stands for."""
        return {
            "rank": self.rank,
            "low": self.low,
            "high": self.high,
            "alpha": None if self.rank is None else 2 * self.rank,
            "lr": self.lr,
            "rank_pattern": dict(self.rank_pattern),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class RankReport:
    """The result of ``ingle rank``."""

    request: RankRequest
    grid: Grid
    floor: float
    ceiling: float
    curves: tuple[Curve, ...]
    ranks: tuple[RankRow, ...]
    layers: tuple[LayerRank, ...]
    recommendation: Recommendation
    trials: Trials
    predicted_s: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``rank.json``."""
        run = self.request.run
        return {
            "task": {
                "model": run.model.id,
                "data": [source.path for source in run.data.sources],
                "steps": self.grid.steps,
            },
            "space": self.request.space,
            "score": {"name": "validation loss", "floor": self.floor, "ceiling": self.ceiling},
            "threshold": self.request.threshold,
            "curves": [curve.to_dict() for curve in self.curves],
            "ranks": [row.to_dict() for row in self.ranks],
            "recommendation": self.recommendation.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "trials": [score.to_dict() for score in self.trials.scores],
            "cost": {
                "trials": len(self.trials.scores),
                "seconds": self.seconds,
                "predicted_seconds": self.predicted_s,
                "seeds": list(self.grid.seeds),
                "rates": self.grid.num_rates,
            },
        }


def study_rank(request: RankRequest, sink: Sink = lambda event: None) -> RankReport:
    """Measures the curve of losses over dimensions and ranks, and recommends a rank.

    Args:
        request: The config and the options of the study.
        sink: Receives the progress of the study and warnings.

    Raises:
        ConfigError: The study does not fit the config, or takes longer than its budget.
        Interrupted: Ctrl-C; the same command continues.
    """
    began = time.monotonic()
    grid, predicted_s = choose_grid(request, sink)
    study = _Study(request, grid, Trials(request.run, shared_options(request.run, grid.steps), sink), sink)
    rows = study.ranks()
    best = rows[_best(rows)]
    recommended = _recommended(rows)
    pattern, layers = study.layers(rows, recommended) if request.space == "lora" else ({}, [])
    curves = [study.curve(method, recommended) for method in request.methods]
    if request.every_rank:
        curves += [study.curve(request.methods[0], row) for row in rows if row is not recommended]
    return RankReport(
        request,
        grid,
        floor=float(mean_losses(best.choice.start_tables()).mean()),
        ceiling=float(mean_losses(best.choice.tables()).mean()),
        curves=tuple(curves),
        ranks=tuple(rows),
        layers=tuple(layers),
        recommendation=_recommend(rows, recommended, curves, pattern, request.threshold),
        trials=study.trials,
        predicted_s=predicted_s,
        seconds=study.trials.seconds_since(began),
    )


class _Study:
    """The trials of one study."""

    def __init__(self, request: RankRequest, grid: Grid, trials: Trials, sink: Sink) -> None:
        self._request, self._grid, self.trials, self._sink = request, grid, trials, sink

    def ranks(self) -> list[RankRow]:
        """Measures unrestricted training: every rank of LoRA, or full fine-tuning."""
        found = [
            (rank, self._best(_label(rank), _space(rank), self._request.run_lr))
            for rank in (self._grid.ranks if self._request.space == "lora" else (None,))
        ]
        best = min((choice for _, choice in found), key=lambda choice: float(mean_losses(choice.tables()).mean()))
        differences = [compare(choice.tables(), best.tables()) for _, choice in found]
        others = iter(
            holm([each.p for each, (_, choice) in zip(differences, found, strict=True) if choice is not best])
        )
        corrected = [1.0 if choice is best else next(others) for _, choice in found]
        return [
            RankRow(rank, choice.scores[0].parameters, choice, difference, p)
            for (rank, choice), difference, p in zip(found, differences, corrected, strict=True)
        ]

    def curve(self, method: Literal["did", "said"], row: RankRow) -> Curve:
        """Measures subspaces of rising dimension, until some beyond the target are known."""
        points: list[Point] = []
        floor, ceiling = row.choice.start_tables(), row.choice.tables()
        before, after = (float(mean_losses(tables).mean()) for tables in (floor, ceiling))
        target = before - self._request.threshold * (before - after)
        for dim in self._grid.dims:
            if dim >= row.parameters or sum(_loss(point) <= target for point in points) >= _BEYOND:
                break
            rule = {"kind": "subspace", "dim": dim, "gains": method == "said"}
            # At this rate, a step of Adam moves the weights as far as without a subspace.
            guess = row.choice.lr * math.sqrt(row.parameters / dim)
            choice = self._best(f"{_label(row.rank)}-{method}-{dim}", _space(row.rank), guess, rule)
            if not choice.failed:
                points.append(Point(dim, choice))
        if not points:
            raise ConfigError(
                f"No dimension is below the {row.parameters:,} trained parameters.",
                where=f"--dims {','.join(map(str, self._grid.dims))}",
                fix="smaller dimensions",
            )
        dims, tables = [point.dim for point in points], [point.choice.tables() for point in points]
        d90 = find_dimension(dims, tables, floor, ceiling, self._request.threshold)
        return Curve(method, row.rank, tuple(points), before, after, d90)

    def layers(self, rows: Sequence[RankRow], recommended: RankRow) -> tuple[dict[str, int], list[LayerRank]]:
        """Returns ranks by layer if they are better than one rank for all, and the directions that each layer uses."""
        largest = rows[-1]
        spectra = [read_spectra(self.trials.folder / score.name / "adapter") for score in largest.choice.scores]
        if not spectra[0]:
            return {}, []
        rank = recommended.rank or 1
        pattern = {path: own for path, own in distribute(spectra, rank).items() if own != rank}
        if not pattern or not self._request.check_layers:
            return {}, layer_ranks(spectra)
        options = {"adapter": {"kind": "lora", "rank": rank, "rank_pattern": pattern}}
        label, lr = f"rank-{rank}-by-layer", recommended.choice.lr
        scores = [self.trials.run(Trial(label, options, lr, seed)) for seed in self._grid.seeds]
        choice = Choice(lr, tuple(scores), tuple(scores), at_edge=False)
        found = None if choice.failed else compare(choice.tables(), recommended.choice.tables())
        is_better = found is not None and found.value < 0 and found.p < _LEVEL
        return pattern if is_better else {}, layer_ranks(spectra)

    def _best(
        self, label: str, space: Mapping[str, Any], guess: float, rule: Mapping[str, Any] | None = None
    ) -> Choice:
        """Measures a configuration at its best learning rate; with a rule, it may fail."""

        def make(lr: float, seed: int) -> Trial:
            return Trial(label, {**space, "optim": {"rule": {**rule, "seed": seed}}} if rule else space, lr, seed)

        done = len(self.trials.scores)
        self._sink(Progress(f"Trials: {label}", done, max(done + 1, self._grid.num_trials(self._request))))
        choice = best_rate(self.trials, make, guess, self._grid.num_rates, self._grid.seeds)
        if choice.failed and rule is None:
            raise ConfigError(
                f"Training fails at every learning rate around {guess:g}.",
                where="optim.lr",
                why=next(score.failure for score in choice.scores if score.failure),
                fix="a smaller --optim.lr",
            )
        if choice.failed:
            self._sink(Warned(f"{label} failed at every learning rate around {guess:g}; it is left out."))
        return choice


def _label(rank: int | None) -> str:
    return "full" if rank is None else f"rank-{rank}"


def _space(rank: int | None) -> dict[str, Any]:
    if rank is None:
        return {"adapter": {"kind": "none"}}
    return {"adapter": {"kind": "lora", "rank": rank, "rank_pattern": {}, "alpha": None}}


def _loss(point: Point) -> float:
    return float(mean_losses(point.choice.tables()).mean())


def _best(rows: Sequence[RankRow]) -> int:
    return min(range(len(rows)), key=lambda index: float(mean_losses(rows[index].choice.tables()).mean()))


def _recommended(rows: Sequence[RankRow]) -> RankRow:
    """Returns the smallest rank whose loss is within a standard error of the best one's."""
    return next(row for row in rows if row.difference.value <= row.difference.stderr)


def _recommend(
    rows: Sequence[RankRow],
    chosen: RankRow,
    curves: Sequence[Curve],
    pattern: Mapping[str, int],
    threshold: float,
) -> Recommendation:
    if chosen.rank is None:
        return Recommendation(None, None, None, chosen.choice.lr, _about_dimension(curves[0], threshold))
    equal = [row.rank for row in rows if row.p_holm >= _LEVEL and row.rank is not None]
    reason = [
        f"Rank {chosen.rank} is the smallest whose loss is within one standard error of the best of "
        f"{plural(len(rows), 'rank')}.",
        f"At 5 %, ranks {min(equal)} to {max(equal)} cannot be told apart from the best one."
        if len(equal) > 1
        else "At 5 %, all other ranks are worse than the best one.",
        _about_dimension(curves[0], threshold),
    ]
    if len(rows) == 1:
        reason = [f"Rank {chosen.rank} is the only one that was tried.", reason[-1]]
    elif chosen is rows[-1]:
        reason.insert(1, "It is the largest that was tried, so a larger one may be better.")
    if chosen.choice.at_edge:
        reason.append(f"The best learning rate of rank {chosen.rank} is at the edge of the rates that were tried.")
    if pattern:
        reason.append("Ranks by layer were better than one rank for all, at an equal sum of ranks.")
    return Recommendation(chosen.rank, min(equal), max(equal), chosen.choice.lr, " ".join(reason), pattern)


def _about_dimension(curve: Curve, threshold: float) -> str:
    d90, share = curve.d90, f"{100 * threshold:g} %"
    if not d90.has_gain:
        return "Training does not lower the loss at 5 %, so no figure means anything: use more steps or other rates."
    if not d90.reached:
        return f"No subspace of up to {d90.largest:,} directions reaches {share} of the gain."
    low = f"{d90.low:,.0f}" if d90.low is not None else f"{curve.points[0].dim:,} or fewer"
    high = f"{d90.high:,.0f}" if d90.high is not None else f"more than {d90.largest:,}"
    return (
        f"{share} of the gain needs about {d90.value:,.0f} directions ({low} to {high}). That is a property of the "
        "task; divided by the parameters of a rank it gives no rank."
    )
