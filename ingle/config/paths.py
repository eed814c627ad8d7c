"""How the files that a config names are found.

A relative path is relative to the current folder.  If nothing is there, it is relative to the folder of the config file
and, for a run that is opened again, to the folder in which the run was started
(:attr:`~ingle.config.run.Run.paths_from`).  A name that is found nowhere stays as it is: it may be a hub id.
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

#: Options that name a file or folder that must exist, by the section they are in and their name.
_PATHS = {
    ("ModelConfig", "id"),
    ("ModelConfig", "tokenizer"),
    ("ModelConfig", "chat_template"),
    ("LowRankAdapter", "path"),
    ("Source", "path"),
}


def is_path(section: type[Section], name: str) -> bool:
    """Whether an option names a file or folder that must exist."""
    return any((kind.__name__, name) in _PATHS for kind in section.__mro__)


def find_path(path: str, *folders: str | Path | None) -> str:
    """A path as it is found: from the current folder as typed, else from the first of ``folders`` that has it."""
    path = expand(path)
    if Path(path).is_absolute() or _exists(Path(path)):
        return path
    others = (Path(folder) / path for folder in folders if folder is not None)
    return next((str(found) for found in others if _exists(found)), path)


def locate_paths(run: Run) -> Run:
    """The same run with every path as it is found from the current folder."""
    return _map_paths(run, lambda path: find_path(path, run.paths_from))


def resolved_paths(run: Run) -> Run:
    """The same run with every local path absolute: two runs name the same files if these are equal."""

    def resolve(path: str) -> str:
        begun_in = Path(run.paths_from or "", expand(path))  # what it meant then, even if a namesake lies here
        found = begun_in if _exists(begun_in) else Path(expand(path))
        return os.path.realpath(found) if _exists(found) else path

    return _map_paths(run, resolve)


def move_paths(run: Run, folder: Path) -> Run:
    """A run read from a run folder, whose files have perhaps moved together with it.

    If the folder in which the run was started is gone, it was probably moved together with the run folder: ``output``
    is the path from the one to the other.
    """
    tail = Path(run.output).parts
    here = Path(os.path.realpath(folder))  # resolve() raises on a loop of links
    if run.paths_from is None or Path(run.paths_from).is_dir() or here.parts[-len(tail) :] != tail:
        return run
    return run.model_copy(update={"paths_from": str(Path(*here.parts[: -len(tail)]))})


def expand(path: str) -> str:
    """A path whose ``~`` is the home folder; anything else, and the ``~`` of a user who does not exist, as it is."""
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
    # os.path.exists() is False for a name that is too long, where Path.exists() raises.
    return os.path.exists(path) or (glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True)))
