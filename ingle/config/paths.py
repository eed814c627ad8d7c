"""Finds the files that a config names.

A relative path is looked up in the current folder, then in the folder of the config file and, for a stored run, in the
folder in which the run was started (:attr:`~ingle.config.run.Run.paths_from`). A path that does not exist stays
unchanged: it may be a hub id.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ingle.config.run import Run
from ingle.config.section import Section

S = TypeVar("S", bound=Section)

#: Options that name an existing file or folder, by section and name.
_PATHS = {
    ("ModelConfig", "id"),
    ("ModelConfig", "tokenizer"),
    ("ModelConfig", "chat_template"),
    ("Adapter", "path"),
    ("Source", "path"),
    ("ValueConfig", "path"),
    ("Distill", "teacher"),
    ("FunctionReward", "path"),
    ("JudgeReward", "prompt"),
    ("ModelReward", "path"),
}


def is_path(section: type[Section], name: str) -> bool:
    """Returns whether an option names an existing file or folder."""
    return any((kind.__name__, name) in _PATHS for kind in section.__mro__)


def find_path(path: str, *folders: str | Path | None) -> str:
    """Returns a path as typed if it exists, or else below the first of ``folders`` in which it exists."""
    path = expand(path)
    if Path(path).is_absolute() or _exists(Path(path)):
        return path
    others = (Path(folder) / path for folder in folders if folder is not None)
    return next((str(found) for found in others if _exists(found)), path)


def locate_paths(run: Run) -> Run:
    """Returns the run with every path as found from the current folder."""
    return _map_paths(run, lambda path: find_path(path, run.paths_from))


def resolved_paths(run: Run) -> Run:
    """Returns the run with absolute local paths, so that equal runs name the same files."""

    def resolve(path: str) -> str:
        original = Path(run.paths_from or "", expand(path))  # wins over a file of that name in the current folder
        found = original if _exists(original) else Path(expand(path))
        return os.path.realpath(found) if _exists(found) else path

    return _map_paths(run, resolve)


def move_paths(run: Run, folder: Path) -> Run:
    """Returns a run read from ``folder`` with ``paths_from`` updated if the run was moved with its files.

    If the folder in which the run was started is gone, it was probably moved together with the run folder: ``output``
    is the path from the former to the latter.
    """
    tail = Path(run.output).parts
    here = Path(os.path.realpath(folder))  # unlike resolve(), accepts loops of links
    if run.paths_from is None or Path(run.paths_from).is_dir() or here.parts[-len(tail) :] != tail:
        return run
    return run.model_copy(update={"paths_from": str(Path(*here.parts[: -len(tail)]))})


def expand(path: str) -> str:
    """Expands ``~`` in a path, unless it refers to an unknown user."""
    return os.path.expanduser(path)


def _map_paths(section: S, change: Callable[[str], str]) -> S:
    return section.model_copy(update=dict(_changed_paths(section, change)))


def _changed_paths(section: Section, change: Callable[[str], str]) -> Iterator[tuple[str, object]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, str) and is_path(type(section), name):
            yield name, change(value)
        elif isinstance(value, Section):
            yield name, _map_paths(value, change)
        elif isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
            yield name, tuple(_map_paths(item, change) for item in value)


def _exists(path: Path) -> bool:
    # os.path.exists() returns False for names that are too long; Path.exists() raises.
    return os.path.exists(path) or (glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True)))
