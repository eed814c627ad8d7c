"""The run folder: what lies where, who may write in it, and what state it is in."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ingle.atomic import write_atomically
from ingle.config.loader import run_from_yaml, run_to_yaml
from ingle.config.paths import move_paths, resolved_paths
from ingle.config.run import Run
from ingle.errors import CheckpointError, ConfigError

#: Options that may differ between a run and its continuation: they change no weight.
CONTINUABLE = ("evaluate", "output", "paths_from", "train.save_every", "train.keep_checkpoints", "train.log_every")

State = Literal["new", "started", "finished"]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run folder.

    Attributes:
        path: The folder, ``output:`` of the config.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "run.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step-N`` checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's layout."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model of a full fine-tuning."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The machine-readable comparison."""
        return self.path / "report.json"

    @property
    def imatrix(self) -> Path:
        """The importance matrix that was gathered on the way."""
        return self.path / "imatrix.gguf"

    @property
    def base_evaluation(self) -> Path:
        """What the base answered, kept because full fine-tuning overwrites it."""
        return self.path / "base_evaluation.json"

    def result(self, run: Run) -> Path:
        """Where the trained weights of ``run`` end up."""
        return self.model if run.adapter.kind == "none" else self.adapter

    def load_run(self) -> Run:
        """The run this folder holds.

        Raises:
            CheckpointError: When there is no ``run.yaml``.
        """
        if not self.config.is_file():
            raise CheckpointError(
                f"{self.path} is not a run folder: it holds no run.yaml.",
                where=str(self.path),
                fix="name the folder that `output:` of the config names",
            )
        return move_paths(run_from_yaml(self.config.read_text(encoding="utf-8"), str(self.config)), self.path)

    def state(self, run: Run) -> State:
        """How far the run in this folder is; ``new`` when there is none.

        Raises:
            ConfigError: When the folder holds another run, or files that no run made.
        """
        if not self.config.is_file():
            if self.path.is_dir() and any(not self._is_of_a_beginning(entry.name) for entry in self.path.iterdir()):
                raise ConfigError(
                    f"{self.path} is not empty and holds no run.",
                    where=f"output = {run.output}",
                    fix="--output=another/folder",
                )
            return "new"
        if not self._holds_anything(run):
            return "new"  # it was refused or killed before its first checkpoint
        changed = differences(self.load_run(), run)
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with other options; continuing it would mix the two.",
                where=f"output = {run.output}",
                why="\n".join(changed),
                fix=f"--output=another/folder, or delete {self.path} to start anew",
            )
        return "finished" if self._is_reported() else "started"

    def _holds_anything(self, run: Run) -> bool:
        """Whether anything was trained that other options could spoil."""
        return self._is_reported() or self.result(run).exists() or any(self.checkpoints.glob("step-*"))

    def _is_reported(self) -> bool:
        """Whether a whole report is there; a damaged one is written again."""
        try:
            return bool(json.loads(self.report.read_bytes())["status"] == "finished")
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def begin(self, run: Run) -> None:
        """Creates the folder, clears away what a killed process left half-written, and writes ``run.yaml``."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._holds_anything(run):
            self.base_evaluation.unlink(missing_ok=True)  # it may be of another model
        for folder in (self.path, self.adapter):
            remove_partial(folder)
        stored = run if run.paths_from else run.model_copy(update={"paths_from": str(Path.cwd())})
        write_atomically(self.config, run_to_yaml(stored).encode())

    def _is_of_a_beginning(self, name: str) -> bool:
        """Whether a file may lie in the folder of a run that was killed before its ``run.yaml`` was there."""
        return name == "run.lock" or name.startswith(f"{self.config.name}.partial-")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process out while the block runs.

        Raises:
            CheckpointError: When another process is at work in this folder.
            ConfigError: When the folder cannot be written.
        """
        lock = self.path / "run.lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w", encoding="utf-8")  # noqa: SIM115 - closed by the block below
        except OSError as error:
            raise ConfigError(
                "the run folder cannot be written.",
                where=f"output = {self.path}",
                why=error.strerror,
                fix="--output=a/folder/of/yours",
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CheckpointError(
                    f"another process is at work in {self.path}.",
                    where=f"output = {self.path}",
                    fix="wait for it, stop it, or choose another folder with --output=",
                ) from error
            try:
                yield
            finally:
                if [entry.name for entry in self.path.iterdir()] == [lock.name]:  # it failed before it began
                    lock.unlink()
                    self.path.rmdir()

    def free_bytes(self) -> int:
        """Free space of the disk the folder is on."""
        return shutil.disk_usage(self.path).free


def differences(old: Run, new: Run) -> list[str]:
    """Options that differ and matter, as ``dotted.path: old -> new``; two ways to name one file do not."""
    before, after = (_flatten(run.model_dump(mode="json")) for run in (old, new))
    meant, wanted = (_flatten(resolved_paths(run).model_dump(mode="json")) for run in (old, new))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == name or key.startswith(f"{name}.") for name in CONTINUABLE):
            continue
        if meant.get(key) != wanted.get(key):
            lines.append(f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}")
    return lines


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
    """Removes what an interrupted write left behind."""
    for entry in folder.glob("*.partial-*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            os.unlink(entry)
