"""The run folder: its files, its lock, and the state of its run."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ingle.atomic import write_atomically
from ingle.config.adapter import WeightAdapter
from ingle.config.document import clip, read_config, write_value
from ingle.config.loader import run_from_yaml, run_to_yaml
from ingle.config.objective import Answer, Classify, Tag
from ingle.config.paths import move_paths, resolved_paths
from ingle.config.run import Run
from ingle.errors import CheckpointError, ConfigError
from ingle.planning import Plan, Strategy
from ingle.stopping import on_forced_exit
from ingle.wording import either

#: Options that may change when a run resumes, because they affect no weight.
CONTINUABLE = (
    *("evaluate", "output", "parallel", "paths_from"),
    *("train.save_every", "train.keep_checkpoints", "train.log_every"),
)

#: Decides which step is kept, and so the weights, if ``train.keep_best`` or ``train.early_stopping`` is set.
_SELECTING = "evaluate.every"

#: What studies write into a run folder.
STUDY_FILES = ("trials", "rank.json", "rank.html", "methods.json", "methods.html")

#: Maximum number of options in a message.
_LISTED = 12

_Flat = Mapping[str, Any]
State = Literal["new", "started", "finished"]


class RunFolder:
    """Files of a run folder.

    Args:
        path: The folder, ``output:`` of the config.

    Attributes:
        config: The resolved config.
        plan: The plan of the last start, with its strategy.
        ranks: Ranks of the adapter's layers, if data decided them.
        memory: What the run does differently since its device ran out of memory.
        start: The checks that were made before the first step.
        metrics: One JSON object per step.
        events: One JSON object per event.
        checkpoints: Folder of ``step-N`` checkpoints.
        adapter: The trained adapter, in the layout of PEFT.
        model: The trained model, after full fine-tuning.
        report: The report as JSON.
        imatrix: The importance matrix that was gathered during training.
        base_evaluation: The evaluation of the base, kept because full fine-tuning overwrites the base.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "run.yaml"
        self.plan = path / "plan.json"
        self.ranks = path / "ranks.json"
        self.memory = path / "memory.json"
        self.start = path / "start.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.report = path / "report.json"
        self.imatrix = path / "imatrix.gguf"
        self.base_evaluation = path / "base_evaluation.json"

    def result(self, run: Run) -> Path:
        """Returns where the trained weights of ``run`` are saved."""
        return self.model if run.adapter.kind == "none" else self.adapter

    def load_run(self) -> Run:
        """Returns the run of this folder.

        Raises:
            CheckpointError: There is no ``run.yaml``.
        """
        if not self.config.is_file():
            raise CheckpointError(
                f"{self.path} is not a run folder: it {self._what_it_is()}.",
                where=str(self.path),
                fix=self.nearby() or "use the folder that is set as `output:` in the config",
            )
        return move_paths(run_from_yaml(read_config(self.config), str(self.config)), self.path)

    def save_plan(self, plan: Plan) -> None:
        """Writes ``plan.json``, from which a resumed run takes its strategy."""
        write_atomically(self.plan, (json.dumps(plan.to_dict(), indent=1) + "\n").encode())

    def load_strategy(self) -> Strategy | None:
        """Returns the strategy of the last start; None if there is none that can be read."""
        try:
            return Strategy(**json.loads(self.plan.read_bytes())["strategy"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def save_ranks(self, run: Run) -> None:
        """Writes ``ranks.json`` if data decided the ranks of the adapter, so that a resumed run need not read them."""
        adapter = run.adapter
        if isinstance(adapter, WeightAdapter) and adapter.init == "eva" and adapter.rank_pattern:
            write_atomically(self.ranks, (json.dumps(adapter.rank_pattern, indent=1) + "\n").encode())

    def with_ranks(self, run: Run) -> Run:
        """Returns a run that resumes, with the ranks that data decided.

        Raises:
            CheckpointError: The file cannot be read.
        """
        if not isinstance(run.adapter, WeightAdapter) or run.adapter.init != "eva" or not self.ranks.is_file():
            return run
        try:
            ranks = {str(path): int(rank) for path, rank in json.loads(self.ranks.read_bytes()).items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                "The ranks of the adapter cannot be read.", where=str(self.ranks), why=str(error), fix="start a new run"
            ) from None
        return run.model_copy(update={"adapter": run.adapter.model_copy(update={"rank_pattern": ranks})})

    def _what_it_is(self) -> str:
        if not self.path.exists():
            return "does not exist"
        return "contains no run.yaml" if self.path.is_dir() else "is a file"

    def nearby(self) -> str | None:
        """Suggests run folders above this path, below it, or with a similar name."""
        above = [folder for folder in self.path.parents if RunFolder(folder).config.is_file()]
        below = sorted(file.parent for file in self.path.glob("*/run.yaml")) if self.path.is_dir() else []
        others = {str(file.parent): file.parent for file in self.path.parent.glob("*/run.yaml")}
        similar = [others[name] for name in difflib.get_close_matches(str(self.path), others, n=1)]
        found = above[:1] or below[:5] or similar
        return f"did you mean {either([str(folder) for folder in found])}?" if found else None

    def last_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        matches = (re.fullmatch(r"step-(\d+)", entry.name) for entry in self.checkpoints.glob("step-*"))
        return max((int(match[1]) for match in matches if match), default=None)

    def state(self, run: Run) -> State:
        """Returns the state of the run in this folder; ``new`` if there is none.

        Raises:
            ConfigError: The folder contains a different run, or files but no run.
        """
        if not self.config.is_file():
            if self.path.is_dir() and any(not self._is_leftover(entry.name) for entry in self.path.iterdir()):
                raise ConfigError(
                    f"{self.path} is not empty and contains no run.",
                    where=f"output = {run.output}",
                    fix="use --output=DIR with a new or an empty folder",
                )
            return "new"
        if not self._has_progress(run):
            return "new"  # the run was refused or killed before its first checkpoint
        changed = differences(self.load_run(), run)
        is_finished = self._is_reported()
        if changed:
            raise ConfigError(
                f"{self.path} contains a finished run with other options."
                if is_finished
                else f"{self.path} contains a run with other options; resuming it would mix the two.",
                where=f"output = {run.output}",
                why="\n".join(_listed(changed)),
                fix=f"use --output=DIR to start a new run, or delete {self.path}",
            )
        return "finished" if is_finished else "started"

    def ignored(self, run: Run) -> list[str]:
        """Lists options of ``run`` that differ from the finished run in this folder and have no effect."""
        return _listed(differences(self.load_run(), run, only=("evaluate", "train")))

    def outlook(self, run: Run) -> str:
        """Returns a sentence that says what starting ``run`` in this folder would do.

        Raises:
            ConfigError: The run would be refused.
        """
        state = self.state(run)
        match state:
            case "finished":
                return f"The run in {self.path} is finished; starting it again changes nothing."
            case "started":
                step = self.last_step()
                if step is None:  # the checkpoints were deleted after the training
                    return f"The run in {self.path} is trained; starting it again evaluates it."
                return f"The run in {self.path} would resume from checkpoints/step-{step}; {step:,} steps are done."
            case "new":
                return f"A new run would start in {self.path}."

    def _has_progress(self, run: Run) -> bool:
        """Returns whether the folder contains a result or a checkpoint."""
        return self._is_reported() or self.result(run).exists() or any(self.checkpoints.glob("step-*"))

    def _is_reported(self) -> bool:
        """Returns whether the folder contains a complete report; a damaged report does not count."""
        try:
            return bool(json.loads(self.report.read_bytes())["status"] == "finished")
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def begin(self, run: Run) -> None:
        """Creates the folder, removes partial files of a killed process, and writes ``run.yaml``."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._has_progress(run):
            self.base_evaluation.unlink(missing_ok=True)  # it may belong to another model
        for folder in (self.path, self.adapter):
            remove_partial(folder)
        stored = run if run.paths_from else run.model_copy(update={"paths_from": str(Path.cwd())})
        write_atomically(self.config, run_to_yaml(stored).encode())

    def _is_leftover(self, name: str) -> bool:
        """Returns whether a file may be there before a run: left from one that was killed early, or of a study."""
        return name in ("run.lock", *STUDY_FILES) or name.startswith(f"{self.config.name}.partial-")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against other processes.

        If the block ends before the run began, it removes the lock and the folders that it created.

        Raises:
            CheckpointError: Another process uses this folder.
            ConfigError: The folder cannot be written.
        """
        lock = self.path / "run.lock"
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]

        def clear() -> None:
            if not self.config.is_file() and lock.exists():
                lock.unlink()
                for folder in made:
                    if any(folder.iterdir()):
                        break
                    folder.rmdir()

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w", encoding="utf-8")  # noqa: SIM115 - closed by the block below
        except OSError as error:
            raise ConfigError(
                "Cannot write to the run folder.",
                where=f"output = {self.path}",
                why=error.strerror,
                fix="use --output=DIR with a folder that you can write to",
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(
                    f"Another process is using {self.path}.",
                    where=f"output = {self.path}",
                    fix="wait for it, stop it, or use --output=DIR to start a new run",
                ) from error
            with on_forced_exit(clear):
                try:
                    yield
                finally:
                    clear()

    def free_bytes(self) -> int:
        """Returns the free space of the folder's disk."""
        return shutil.disk_usage(self.path).free


def differences(old: Run, new: Run, *, only: Sequence[str] | None = None) -> list[str]:
    """Lists options that differ and affect the weights, as ``dotted.path: old -> new``.

    Two paths to the same file are equal.

    Args:
        old: The run before.
        new: The run now. Labels that it does not name are those of the run before.
        only: If given, compare these sections instead, including options that do not affect the weights.
    """
    new = with_names(new, old)
    before, after = (_flatten(run.model_dump(mode="json")) for run in (old, new))
    resolved_old, resolved_new = (_flatten(resolved_paths(run).model_dump(mode="json")) for run in (old, new))
    keys = [key for key in (before | after) if resolved_old.get(key) != resolved_new.get(key)]
    if only is None:
        selects = old.train.keep_best or old.train.early_stopping is not None
        keys = [key for key in keys if not _is_in(key, CONTINUABLE) or (selects and key == _SELECTING)]
    else:
        keys = [key for key in keys if _is_in(key, only)]
    return [_change(key, before, after, resolved_old, resolved_new) for key in sorted(keys)]


def _change(key: str, before: _Flat, after: _Flat, resolved_old: _Flat, resolved_new: _Flat) -> str:
    if before.get(key) == after.get(key):  # one relative path, seen from two folders
        return f"{key}: {write_value(resolved_old[key])} -> {write_value(resolved_new[key])}"
    return f"{key}: {_shown(before, key)} -> {_shown(after, key)}"


def with_names(run: Run, former: Run) -> Run:
    """Returns a run with the labels that were found in the training data when it began, where it does not name them."""
    own, known = run.objective, former.objective
    if not isinstance(own, Classify | Tag | Answer) or type(own) is not type(known):
        return run
    unset: dict[str, object] = {"labels": None, "problem": "auto", "no_answer": "auto"}
    found = {name: getattr(known, name) for name, value in unset.items() if getattr(own, name, "") == value}
    return run.model_copy(update={"objective": own.model_copy(update=found)})


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in sections)


def _shown(options: Mapping[str, Any], key: str) -> str:
    return clip(write_value(options[key])) if key in options else "unset"


def _listed(lines: Sequence[str]) -> list[str]:
    """Returns the first lines and the number of the others."""
    return [*lines[:_LISTED], *([f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else [])]


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flatten(value, f"{path}.{key}" if path else key)
    return flat


def remove_partial(folder: Path) -> None:
    """Removes the files of interrupted writes."""
    for entry in folder.glob("*.partial-*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            os.unlink(entry)
