"""Trials of a study: ordinary runs in ``OUTPUT/trials/NAME``, each resumable, reopened and exported like any run.

The name of a trial ends with a digest of its options. So a study that is repeated with the same options reads what it
has measured, and one with other options measures again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ingle import evaluation, flow, scoring
from ingle.atomic import write_atomically
from ingle.config.paths import locate_paths
from ingle.config.rules import check
from ingle.config.run import Run
from ingle.errors import CheckpointError, ConfigError, NonFiniteError
from ingle.events import Event, Sink, Warned
from ingle.kernels.allocator import return_freed_memory
from ingle.report.results import RunReport
from ingle.training.checkpoint import read
from ingle.training.folder import RunFolder

Floats = npt.NDArray[np.float64]

#: File of a finished trial, written last.
RESULT = "trial.json"
#: File of its outputs for the task.
_TASK = "task.json"
#: Held-out share of the rows of a config without validation data.
_HELD_OUT = 0.1
#: Hexadecimal digits of a name.
_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a study.

    Attributes:
        label: What is tried, for its name (``rank-4``).
        options: Options that differ from those of the study, as nested sections; a section with ``kind`` replaces the
            whole section.
        lr: Peak learning rate.
        seed: Seed of the run.
    """

    label: str
    options: Mapping[str, Any]
    lr: float
    seed: int


@dataclass(frozen=True, slots=True)
class Score:
    """What a trial measured.

    Attributes:
        name: Its folder in ``trials``.
        label: What was tried.
        lr: Peak learning rate.
        seed: Seed of the run.
        loss: Validation loss after the last step, in nats per unit of the objective.
        start_loss: Validation loss before the first step.
        seconds: Time of the run, with loading and validation.
        train_s: Time of training.
        peak_memory_bytes: Highest memory in training.
        planned_memory_bytes: What the plan predicted.
        parameters: Trained parameters.
        num_parameters: Parameters of the model.
        result_bytes: Size of the saved weights: those of the adapter, or of the model.
        groups: Loss and denominator of each held-out group after the last step, [G, 2]; empty if the run failed.
        start_groups: The same before the first step.
        failure: Why the run did not end; None if it did.
    """

    name: str
    label: str
    lr: float
    seed: int
    loss: float = math.inf
    start_loss: float = math.inf
    seconds: float = 0.0
    train_s: float = 0.0
    peak_memory_bytes: int = 0
    planned_memory_bytes: int = 0
    parameters: int = 0
    num_parameters: int = 0
    result_bytes: int = 0
    groups: Sequence[Sequence[float]] = field(default=(), repr=False)
    start_groups: Sequence[Sequence[float]] = field(default=(), repr=False)
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures without the tables of groups."""
        figures = {name: value for name, value in asdict(self).items() if not name.endswith("groups")}
        return {name: None if value == math.inf else value for name, value in figures.items()}


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What the model of a trial scores on the task of ``evaluate``.

    Attributes:
        metric: The headline metric.
        higher_is_better: Direction of improvement.
        scores: Its score of each sample.
        metrics: All metrics by name.
    """

    metric: str
    higher_is_better: bool
    scores: tuple[float, ...]
    metrics: Mapping[str, float]


class Trials:
    """Runs the trials of a study.

    Args:
        base: The config that all trials share; its ``output`` is the folder of the study.
        options: Options of all trials, as in :class:`Trial`.
        sink: Receives the progress of the study, and warnings that all trials share once.

    Attributes:
        scores: What was measured, in the order of the calls.
        num_run: Trials that were run by this call of the program.
    """

    def __init__(self, base: Run, options: Mapping[str, Any], sink: Sink = lambda event: None) -> None:
        self._base, self._options, self._sink = base, options, sink
        self._seen: set[str] = set()
        self.folder = Path(base.output) / "trials"
        self.scores: list[Score] = []
        self.num_run = 0

    def seconds_since(self, began: float) -> float:
        """Returns the time since a reading of ``time.monotonic``; at least that of all runs, earlier ones included."""
        return max(time.monotonic() - began, sum(score.seconds for score in self.scores))

    def run_of(self, trial: Trial) -> Run:
        """Returns the config of a trial.

        Raises:
            ConfigError: The options cannot be combined.
        """
        merged = _merge(_merge(self._base.model_dump(mode="json"), self._options), trial.options)
        merged = _merge(merged, {"optim": {"lr": trial.lr}, "seed": trial.seed})
        try:
            run = Run.model_validate(merged | {"output": str(self.folder / "none")})
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(first["msg"], where=".".join(map(str, first["loc"]))) from error
        digest = hashlib.sha256(run.model_dump_json().encode()).hexdigest()[:_DIGITS]
        run = run.model_copy(
            update={"output": str(self.folder / f"{trial.label}-lr-{trial.lr:g}-seed-{trial.seed}-{digest}")}
        )
        check(run)
        return run

    def find(self, trial: Trial) -> Score | None:
        """Returns the score of a trial that has ended; None if it has not."""
        return _read(Path(self.run_of(trial).output) / RESULT)

    def run(self, trial: Trial) -> Score:
        """Runs a trial, resumes it, or returns what it measured before.

        A run that ends in an error of training (NaN, no gradient) is a trial without a score.

        Raises:
            IngleError: The config, the data or a file is wrong.
            Interrupted: Ctrl-C or SIGTERM; the next call resumes the trial.
        """
        run = self.run_of(trial)
        folder = RunFolder(Path(run.output))
        score = _read(folder.path / RESULT)
        if score is None:
            gc.collect()  # the model of the last run is in reference cycles
            return_freed_memory()  # its memory is not to count as that of this trial
            score = self._measure(trial, run, folder)
            self.num_run += 1
            known = {name: value for name, value in asdict(score).items() if value != math.inf}
            write_atomically(folder.path / RESULT, json.dumps(known, allow_nan=False).encode())
            if score.failure is None:  # a finished run does not need them
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
        self.scores.append(score)
        return score

    def evaluate(self, score: Score, sink: Sink = lambda event: None) -> TaskScore:
        """Scores the model of a trial on the task of the study, or returns what was scored before.

        Raises:
            EvaluationError: The task does not suit the model.
        """
        task = locate_paths(self._base).task
        assert task is not None, "the config has no task"
        folder, key = self.folder / score.name, task.model_dump_json()
        result = evaluation.load_result(key, folder / _TASK)
        if result is None:
            result = scoring.run_alone(str(folder), task, sink)
            evaluation.save_result(result, key, folder / _TASK)
        summary = evaluation.summarize(result, task)
        head = summary.headline
        return TaskScore(
            head,
            summary.metrics[head].higher_is_better,
            tuple(sample.scores[head] or 0.0 for sample in summary.samples),  # a score that is not finite counts as 0
            {name: each.value for name, each in summary.metrics.items() if each.value is not None},
        )

    def _measure(self, trial: Trial, run: Run, folder: RunFolder) -> Score:
        known: dict[str, Any] = {"name": folder.path.name, "label": trial.label, "lr": trial.lr, "seed": trial.seed}
        try:
            report = flow.finetune(run, self._listen)
        except NonFiniteError as error:
            return Score(**known, failure=error.message)
        return Score(**known, **_figures(report, folder, run))

    def _listen(self, event: Event) -> None:
        """Passes on what a study should show of its runs: a warning once, and no steps."""
        if isinstance(event, Warned) and event.message not in self._seen:
            self._seen.add(event.message)
            self._sink(event)


def require_new_adapters(run: Run) -> None:
    """Refuses a config whose adapter continues another one: a study compares adapters that begin anew.

    Raises:
        ConfigError: It does.
    """
    if getattr(run.adapter, "path", None) is not None:
        raise ConfigError(
            "A study compares adapters that begin anew, but this one continues another.",
            where="adapter.path",
            fix="--adapter.path=null, or merge that adapter (`ingle export RUN --to safetensors --out DIR`) and use "
            "--model.id=DIR",
        )


def shared_options(run: Run, steps: int | None) -> dict[str, Any]:
    """Returns the options that all trials of a study have: a validation before and after training, and nothing else.

    Args:
        run: The config of the study. If it has no validation data, a tenth of its rows is held out.
        steps: Steps of a trial; None for those of the config, for a plan alone.
    """
    held_out = {} if run.data.validation is not None else {"validation": {"share": _HELD_OUT, "sources": []}}
    train = {"keep_best": False, "early_stopping": None, "save_every": 0, "keep_checkpoints": 1}
    evaluated: dict[str, Any] = {"sources": [], "every": steps, "num_validation_samples": 0}
    alone = {"kind": "none", "num_processes": 1, "shard_size": None}  # a study starts no processes
    return {
        "parallel": alone,
        "data": held_out,
        "train": train | ({} if steps is None else {"num_steps": steps}),
        "evaluate": evaluated,
    }


def groups(score: Score) -> Floats:
    """Returns the table of a score, [G, 2]."""
    return np.asarray(score.groups, np.float64).reshape(-1, 2)


def _figures(report: RunReport, folder: RunFolder, run: Run) -> dict[str, Any]:
    """Returns the figures of a finished run as the fields of its score."""
    step = folder.last_step()
    if step is None or report.validation is None:
        raise CheckpointError("A trial has no validation.", where=str(folder.path), fix=f"delete {folder.path}")
    state = read(folder.checkpoints / f"step-{step}").state("selection")
    history = report.validation.history
    weights = folder.result(run).rglob("*.safetensors")  # a tokenizer lies there too, the same for all methods
    return {
        "loss": history[-1].loss,
        "start_loss": history[0].loss,
        "seconds": report.wall_s,
        "train_s": report.train_s,
        "peak_memory_bytes": report.plan.get("measured_peak_bytes") or report.peak_memory_bytes,
        "planned_memory_bytes": int(report.plan["predicted_peak_bytes"]),
        "parameters": int(report.plan["trainable_parameters"]),
        "num_parameters": int(report.plan["num_parameters"]),
        "result_bytes": sum(file.stat().st_size for file in weights),
        "groups": state["end_1"].tolist(),
        "start_groups": state["end_0"].tolist(),
    }


def _merge(base: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested options with others laid over them; a section with a kind of its own replaces the former one."""
    merged = dict(base)
    for name, value in options.items():
        former = merged.get(name)
        if isinstance(value, Mapping) and isinstance(former, Mapping) and _is_same_kind(former, value):
            value = _merge(former, value)
        merged[name] = value
    return merged


def _is_same_kind(former: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return all(value.get(tag, former.get(tag)) == former.get(tag) for tag in ("kind", "format"))


def _read(file: Path) -> Score | None:
    try:
        return Score(**json.loads(file.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            "The result of a trial cannot be read.", where=str(file), why=str(error), fix=f"delete {file.parent}"
        ) from error
