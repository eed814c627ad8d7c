"""Checks the name of a model or run against the file system, before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from ingle.errors import ModelError
from ingle.wording import nearest

#: Files that identify a run, adapter or model folder.
_MARKS = ("run.yaml", "adapter_config.json", "config.json")
_HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
_HUB_FILE = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*/.+\.gguf$", re.IGNORECASE)

#: Folder entries that are searched for a similar name.
_MAX_ENTRIES = 1000
#: Runs that a message lists.
_SHOWN_RUNS = 3
_EXPECTED = "a run folder (run.yaml), an adapter folder (adapter_config.json), a model folder (config.json)"


def check_name(name: str) -> None:
    """Raises if a name cannot be a run, an adapter, a model or a hub id.

    Args:
        name: The name as typed: a path, or ``OWNER/NAME`` on the hub.

    Raises:
        ModelError: With the most similar name, or with the expected kinds of names.
    """
    if not name.strip():
        raise ModelError("The name of the model is empty.", fix=f"name {_EXPECTED} or a .gguf file")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            _check_folder(path)
        elif path.is_file():
            _check_file(path)
        elif not _may_be_on_the_hub(name, path):
            raise missing(name)
    except (OSError, RuntimeError) as error:  # a RuntimeError means the home of an unknown user
        why = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"{name[:200]} cannot be opened.", where=name[:200], why=why) from error


def missing(name: str) -> ModelError:
    """Returns the error for a name that does not exist."""
    kind = "file" if name.lower().endswith(".gguf") else "folder"
    return ModelError(f"There is no {kind} {name}.", fix=_advice(name))


def nearest_path(path: str | Path) -> str | None:
    """Returns the existing path that is most similar to ``path``, folder by folder; None if nothing is similar."""
    path = Path(path).expanduser()
    try:
        if path.exists():
            return str(path)
        folder = None if path == path.parent else nearest_path(path.parent)
        if folder is None or not Path(folder).is_dir():
            return None
        entries = {entry.name.lower(): entry for entry in islice(Path(folder).iterdir(), _MAX_ENTRIES)}
    except (OSError, ValueError):
        return None
    close = nearest(path.name.lower(), entries, 0.7)
    return str(entries[close]) if close else None


def _check_folder(folder: Path) -> None:
    if _is_marked(folder):
        return
    inside = sorted(path for path in folder.iterdir() if _is_marked(path)) or _runs(folder)
    files = sorted(folder.glob("*.gguf"))
    if inside:
        raise ModelError(
            f"{folder} is not a run or model, but contains some.", fix=f"name one of them: {_listed(inside)}"
        )
    if files:
        raise ModelError(f"{folder} is a folder, but a GGUF model is a file.", fix=f"name the file: {_listed(files)}")
    raise ModelError(
        f"{folder} contains no run and no model.",
        why=f"it has none of {', '.join(_MARKS)}; neither has a run that stopped before its first checkpoint"
        if any(folder.iterdir())
        else "it is empty",
        fix=f"name {_EXPECTED} or a .gguf file",
    )


def _check_file(file: Path) -> None:
    if file.suffix.lower() == ".gguf":
        return
    raise ModelError(
        f"{file} is not a model: the only model files are .gguf files.",
        fix=f"name its folder {file.parent}" if _is_marked(file.parent) else f"name {_EXPECTED} or a .gguf file",
    )


def _is_marked(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in _MARKS)


def _may_be_on_the_hub(name: str, path: Path) -> bool:
    """Returns whether a name that does not exist locally may be a hub id rather than a misspelled path."""
    if not (_HUB_FILE if name.lower().endswith(".gguf") else _HUB_ID).match(name):
        return False
    owner, _, rest = name.partition("/")
    if rest:  # a folder of models may be organized like the hub; a folder of runs is not
        return not _runs(Path(owner))
    near = [run.name for run in _similar_runs(name)] + [Path(found).name for found in [nearest_path(path)] if found]
    return all(abs(len(found) - len(name)) > 1 for found in near)


def _advice(name: str) -> str:
    near = nearest_path(name) or next(iter(_similar_runs(name)), None)
    if near:
        return f"did you mean {near}?"
    here = _runs(Path.cwd())
    known = f"; the runs in this folder are {_listed(here)}" if here else ""
    return f"name {_EXPECTED}, a .gguf file, or a model on the hub as OWNER/NAME{known}"


def _similar_runs(name: str) -> list[Path]:
    """Returns runs below the current folder with a name similar to a name without slashes."""
    if "/" in name:
        return []
    runs = {run.name: run for run in _runs(Path.cwd())}
    close = nearest(name, runs, 0.7)
    return [runs[close]] if close else []


def _runs(folder: Path) -> list[Path]:
    """Returns run folders one or two levels below a folder, as paths to type."""
    found = (path for pattern in ("*/run.yaml", "*/*/run.yaml") for path in sorted(folder.glob(pattern)))
    return [_as_typed(path.parent) for path in islice(found, _MAX_ENTRIES)]


def _as_typed(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _listed(paths: Iterable[Path]) -> str:
    names = [str(path) for path in paths]
    more = f" and {len(names) - _SHOWN_RUNS} more" if len(names) > _SHOWN_RUNS else ""
    return ", ".join(names[:_SHOWN_RUNS]) + more
