"""``ingle methods``: ways to adapt a model, measured on the user's own task at equal steps and tuned learning rates."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingle import flow
from ingle.config.run import Run
from ingle.errors import CheckpointError, ConfigError, DataError, IngleError
from ingle.events import Progress, Sink, Warned
from ingle.studies.curve import Difference, Tables, compare, holm, mean_losses, resample
from ingle.studies.methods import Method, methods_of
from ingle.studies.rates import Choice, best_rate
from ingle.studies.trials import TaskScore, Trial, Trials, require_new_adapters, shared_options
from ingle.wording import duration, plural

#: The method that others are compared with.
_REFERENCE = "lora"
#: Seconds of a trial beyond its plan.
_START_S = 5.0


@dataclass(frozen=True)
class MethodRequest:
    """The options of ``ingle methods``.

    Attributes:
        run: The config; its ``output`` is the folder of the study.
        names: Methods to compare; None for all.
        num_seeds: Seeds of each method; None for 3, or fewer in a small budget.
        num_rates: Learning rates of each method; None for 3.
        steps: Steps of a trial; None for those of the config.
        budget_s: Seconds that the study may take; None for any.
    """

    run: Run
    names: tuple[str, ...] | None = None
    num_seeds: int | None = None
    num_rates: int | None = None
    steps: int | None = None
    budget_s: float | None = None


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A method and what was measured.

    Attributes:
        method: The method.
        refused: Why the model does not allow it; None if it was measured.
        choice: What was measured at its best learning rate.
        tasks: Scores of the task for each seed; empty without a task.
    """

    method: Method
    refused: str | None = None
    choice: Choice | None = None
    tasks: tuple[TaskScore, ...] = ()


@dataclass(frozen=True, slots=True)
class MethodReport:
    """The result of ``ingle methods``."""

    request: MethodRequest
    steps: int
    seeds: tuple[int, ...]
    rows: tuple[MethodRow, ...]
    trials: Trials
    predicted_s: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``methods.json``."""
        run = self.request.run
        scored = [row for row in self.rows if row.choice is not None and not row.choice.failed]
        metric = scored[0].tasks[0] if scored and all(row.tasks for row in scored) else None
        rows = [dict(_describe(row, metric, self.steps)) for row in self.rows]
        tables = {row.method.name: _tables(row, metric) for row in scored}
        _compare_all(rows, tables)
        _mark_front(rows, {name: float(mean_losses(own).mean()) for name, own in tables.items()})
        return {
            "task": {"model": run.model.id, "data": [source.path for source in run.data.sources], "steps": self.steps},
            "score": {
                "name": "validation loss" if metric is None else metric.metric,
                "higher_is_better": metric is not None and metric.higher_is_better,
                "reference": _REFERENCE,
            },
            "methods": rows,
            "trials": [score.to_dict() for score in self.trials.scores],
            "cost": {
                "trials": len(self.trials.scores),
                "seconds": self.seconds,
                "predicted_seconds": self.predicted_s,
                "seeds": list(self.seeds),
            },
        }


def study_methods(request: MethodRequest, sink: Sink = lambda event: None) -> MethodReport:
    """Measures every method at its best learning rate.

    Rates are chosen by the loss on half of the held-out rows. Methods are compared on the task of ``evaluate``, or on
    the other half of the rows.

    Args:
        request: The config and the options of the study.
        sink: Receives the progress of the study and warnings.

    Raises:
        ConfigError: A method is unknown, no method is possible, or the study takes longer than its budget.
        Interrupted: Ctrl-C; the same command continues.
    """
    began = time.monotonic()
    require_new_adapters(request.run)
    methods = _chosen(request)
    steps, seeds, predicted_s = _scale(request, len(methods), sink)
    trials = Trials(request.run, shared_options(request.run, steps), sink)
    rows = []
    for number, method in enumerate(methods):
        sink(Progress(f"Methods: {method.name}", number, len(methods)))
        rows.append(_measure(method, request, trials, seeds, sink))
    if all(row.refused is not None for row in rows):
        raise ConfigError("No method is possible.", why=rows[0].refused)
    return MethodReport(request, steps, seeds, tuple(rows), trials, predicted_s, trials.seconds_since(began))


def _chosen(request: MethodRequest) -> list[Method]:
    known = methods_of(request.run)
    names = request.names or tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"Unknown method: {', '.join(unknown)}.", where="--methods", fix=f"one of {', '.join(known)}")
    return [known[name] for name in names]


def _scale(request: MethodRequest, num_methods: int, sink: Sink) -> tuple[int, tuple[int, ...], float]:
    """Returns the steps of a trial, the seeds that fit the budget, and the predicted time; says them."""
    steps = request.steps or request.run.train.num_steps
    trials = Trials(request.run, shared_options(request.run, steps), sink)
    plan = flow.plan(trials.run_of(Trial("plan", {}, _lr(request.run), request.run.seed)))
    steps = steps or plan.num_steps
    each_s = plan.hours * 3600 + _START_S
    for count in [request.num_seeds] if request.num_seeds else [3, 2, 1]:
        num_trials = num_methods * ((request.num_rates or 3) + count - 1)
        seconds = num_trials * each_s
        if request.budget_s is None or seconds <= request.budget_s:
            break
    else:
        raise ConfigError(
            f"The smallest study takes about {duration(seconds)}; the budget is {duration(request.budget_s or 0)}.",
            where="--budget",
            why=f"{plural(num_trials, 'trial')} of about {duration(each_s)}",
            fix="a smaller --steps, fewer --methods, or a larger --budget",
        )
    more = ", and the evaluation of the task" if request.run.task else ""
    trials_of = f"{plural(num_trials, 'trial')} of {plural(steps, 'step')}"
    sink(Warned(f"About {trials_of}, {duration(seconds)} ({duration(each_s)} each){more}."))
    return steps, tuple(range(request.run.seed, request.run.seed + count)), seconds


def _lr(run: Run) -> float:
    lr = run.optimizer.lr
    assert lr is not None
    return lr


def _measure(method: Method, request: MethodRequest, trials: Trials, seeds: Sequence[int], sink: Sink) -> MethodRow:
    refused = ""
    guess = _lr(request.run) * method.lr_factor
    for section in method.sections:

        def make(lr: float, seed: int, section: Mapping[str, Any] = section) -> Trial:
            return Trial(method.name, {"adapter": section}, lr, seed)

        try:
            choice = best_rate(trials, make, guess, request.num_rates or 3, seeds)
            if choice.failed:
                return MethodRow(method, refused=next(score.failure for score in choice.scores if score.failure))
            tasks = tuple(trials.evaluate(score, sink) for score in choice.scores) if request.run.task else ()
            return MethodRow(method, choice=choice, tasks=tasks)
        except (CheckpointError, DataError):  # a full disk, or missing data: no fault of the method
            raise
        except IngleError as error:
            refused = " ".join(filter(None, (error.message, error.why)))
    sink(Warned(f"{method.name} is not possible here: {refused}"))
    return MethodRow(method, refused=refused)


def _tables(row: MethodRow, metric: TaskScore | None) -> Tables:
    """Returns what is compared, lower is better: losses, or scores with the opposite sign where higher is better."""
    assert row.choice is not None
    if metric is None:
        return row.choice.tables()
    sign = -1.0 if metric.higher_is_better else 1.0
    return [np.stack([sign * np.asarray(task.scores), np.ones(len(task.scores))], 1) for task in row.tasks]


def _describe(row: MethodRow, metric: TaskScore | None, steps: int) -> Iterator[tuple[str, Any]]:
    yield from {"name": row.method.name, "refused": row.refused}.items()
    if row.choice is None:
        return
    tables, score = _tables(row, metric), row.choice.scores[0]
    sign = -1.0 if metric is not None and metric.higher_is_better else 1.0
    ends = sorted(sign * end for end in np.quantile(resample([tables])[:, 0], [0.025, 0.975]).tolist())
    yield "score", {"value": sign * float(mean_losses(tables).mean()), "low": ends[0], "high": ends[1]}
    yield "scores", [sign * loss for loss in mean_losses(tables).tolist()]
    yield "validation_loss", float(mean_losses(row.choice.tables()).mean())
    yield (
        "metrics",
        {name: float(np.mean([task.metrics[name] for task in row.tasks])) for name in row.tasks[0].metrics}
        if row.tasks
        else {},
    )
    yield "parameters", score.parameters
    yield "share", score.parameters / score.num_parameters
    yield "peak_memory_bytes", max(each.peak_memory_bytes for each in row.choice.scores)
    yield "planned_memory_bytes", score.planned_memory_bytes
    yield "step_s", min(each.train_s for each in row.choice.scores) / steps
    yield "result_bytes", score.result_bytes
    yield "merges", row.method.merges
    yield "lr", row.choice.lr
    yield "at_edge", row.choice.at_edge


def _compare_all(rows: list[dict[str, Any]], tables: Mapping[str, Tables]) -> None:
    """Adds the difference from the reference to each row, positive where worse, with p-values corrected by Holm."""
    if _REFERENCE not in tables:
        return
    found: dict[str, Difference] = {
        name: compare(own, tables[_REFERENCE]) for name, own in tables.items() if name != _REFERENCE
    }
    corrected = dict(zip(found, holm([each.p for each in found.values()]), strict=True))
    for row in rows:
        if (difference := found.get(row["name"])) is not None:
            p = corrected[row["name"]]
            outcome = "unclear" if p >= 0.05 else "better" if difference.value < 0 else "worse"
            row["worse_by"] = {
                "value": difference.value,
                "ci95": list(difference.ci95),
                "p_holm": p,
                "outcome": outcome,
            }


def _mark_front(rows: Sequence[dict[str, Any]], costs: Mapping[str, float]) -> None:
    """Marks the methods that no other one beats in both score and trained parameters."""
    places = {row["name"]: (costs[row["name"]], row["parameters"]) for row in rows if row["name"] in costs}
    for row in rows:
        if (place := places.get(row["name"])) is not None:
            row["front"] = not any(
                other != place and other[0] <= place[0] and other[1] <= place[1] for other in places.values()
            )
