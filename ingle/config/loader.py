"""From a YAML file and flags to a frozen, checked :class:`~ingle.config.run.Run`.

Paths in a file are found as :mod:`ingle.config.paths` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from ingle.config.document import Node, read_document
from ingle.config.evaluate import TaskConfig
from ingle.config.files import read_config
from ingle.config.ignored import find_ignored
from ingle.config.origin import Origin, to_yaml, trace
from ingle.config.overrides import lay_over, read_overrides, tidy
from ingle.config.paths import expand, find_path, is_path
from ingle.config.problems import Problem, locate, option_path, raise_problems, translate
from ingle.config.rules import find_violations
from ingle.config.run import Run
from ingle.config.schema import Choice, Rows, Table, shapes
from ingle.config.section import Section
from ingle.errors import ConfigError

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class LoadedRun:
    """A run and how it came about.

    Attributes:
        run: The resolved run.
        origins: ``default``, ``file`` or ``flag`` for each dotted path.
        notes: What was dropped or changed on the way, in words.
    """

    run: Run
    origins: dict[str, Origin]
    notes: list[str] = field(default_factory=list)


def load_run(path: Path | None, overrides: Sequence[str] = ()) -> LoadedRun:
    """Reads a config file and lays flags over it.

    Args:
        path: A YAML file; None when the flags say everything.
        overrides: ``--a.b=c``, or ``--a.b`` and ``c`` as two words.

    Raises:
        ConfigError: With everything that is wrong, at once.
    """
    run, root, notes = _load(Run, path, overrides)
    return LoadedRun(run, trace(run, root), notes)


def load_task(source: Path | TaskConfig | None, overrides: Sequence[str] = ()) -> TaskConfig:
    """Reads a task and lays flags over it.

    Args:
        source: A file with the options of ``evaluate:``, or a run's config, of which that section is taken; or a task;
            or None when the flags say everything.
        overrides: As of :func:`load_run`.

    Raises:
        ConfigError: With everything that is wrong, at once.
    """
    task, _, _ = _load(TaskConfig, source, overrides)
    return task


def run_from_yaml(text: str, name: str = "run.yaml") -> Run:
    """Reads what :func:`run_to_yaml` wrote.

    Args:
        text: A YAML document.
        name: What errors call it.

    Raises:
        ConfigError: With everything that is wrong, at once.
    """
    return _build(Run, _section_node(read_document(text, name), name))


def run_to_yaml(run: Run) -> str:
    """The whole run as YAML, every option written out; reading it gives an equal run."""
    return to_yaml(run)


def _load(section: type[S], source: Path | S | None, overrides: Sequence[str]) -> tuple[S, Node, list[str]]:
    flags = read_overrides(overrides)
    root = Node({}, "flag", "the flags")
    path = source if isinstance(source, Path) else None
    begun_in = None
    if path is not None:
        root = _section_node(read_document(read_config(path), str(path)), str(path))
        begun_in = _text_at(root, "paths_from")
        if section is TaskConfig:
            root = _task_node(root, str(path))
    elif isinstance(source, Section):
        root = _section_node(read_document(to_yaml(source), "the task"), "the task")
    notes = lay_over(root, flags, section)
    tidy(root, Table(section))
    if section is Run:
        notes += find_ignored(root)
    for node in _path_nodes(root, section):
        _settle(node, path.parent if path is not None else None, begun_in)
    if begun_in is not None and section is not TaskConfig:
        del root.value["paths_from"]  # it has done its work: from here on all paths are those of the current folder
    if (output := _text_at(root, "output")) is not None:
        root.value["output"].value = expand(output)
    return _build(section, root), root, notes


def _text_at(root: Node, name: str) -> str | None:
    node = root.value.get(name)
    return node.value if node is not None and isinstance(node.value, str) and node.value else None


def _section_node(root: Node, name: str) -> Node:
    if root.value is None:
        root.value = {}
    if not isinstance(root.value, dict):
        raise ConfigError("A config file holds options such as `seed: 0`, one per line.", where=name)
    return root


def _task_node(root: Node, name: str) -> Node:
    """The options of a task: the file's own, or those of the ``evaluate:`` section of a run's config."""
    task = root.value.get("evaluate")
    if task is not None and task.value is not None:
        return _section_node(task, name)
    if task is not None or root.value.keys() & {"model", "data", "output"}:
        raise ConfigError(
            "This config holds no task: it has no `evaluate:` section.",
            where=name,
            fix="add `evaluate: {sources: [held-out.jsonl]}` to it, or name a task file",
        )
    return root


def _build(section: type[S], root: Node) -> S:
    tidy(root, Table(section))
    try:
        built = section.model_validate(root.plain())
    except ValidationError as error:
        if not _repair(error, root, section):
            raise_problems(translate(error, root, section))
        try:
            built = section.model_validate(root.plain())
        except ValidationError as error_left:
            raise_problems(translate(error_left, root, section))
            raise AssertionError("a validation error has at least one problem") from error_left
    raise_problems([_with_lines(problem, root) for problem in find_violations(built)])
    return built


def _repair(error: ValidationError, root: Node, section: type[Section]) -> bool:
    """Takes text as it was written (``revision: 123``) and whole numbers in any spelling (``num_steps: 1e3``)."""
    repaired = False
    for detail in error.errors(include_url=False):
        path, _ = option_path(detail["loc"], section)
        tail = detail["loc"][-1]
        node = locate(root, path)
        if node is not None and isinstance(node.value, list) and isinstance(tail, int) and tail < len(node.value):
            node = node.value[tail]
        if node is None:
            continue
        if detail["type"] == "string_type" and node.raw is not None and node.value is not None:
            node.value, repaired = node.raw, True
        elif detail["type"] == "int_type" and isinstance(node.value, float) and node.value.is_integer():
            node.value, repaired = int(node.value), True
    return repaired


def _with_lines(problem: Problem, root: Node) -> Problem:
    """Adds to the options a rule names the lines or flags that gave them."""
    if problem.where is None:
        return problem
    parts = []
    for name in problem.where.split(", "):
        node = locate(root, tuple(int(key) if key.isdigit() else key for key in name.split(" ")[0].split(".")))
        parts.append(name if node is None or node.origin == "flag" else f"{name} ({node.where})")
    return Problem(problem.message, ", ".join(parts), problem.fix)


def _path_nodes(node: Node, section: type[Section]) -> Iterator[Node]:
    """The nodes of options that name files."""
    if not isinstance(node.value, dict):
        return
    for name, shape in shapes(section).items():
        below = node.value.get(name)
        if below is None:
            continue
        if is_path(section, name):
            yield below
        match shape:
            case Table(inner):
                yield from _path_nodes(below, inner)
            case Rows(inner):
                for item in below.value if isinstance(below.value, list) else ():
                    yield from _path_nodes(item, inner)
            case Choice(_, members, _):
                for inner in members.values():
                    yield from _path_nodes(below, inner)
            case _:
                pass


def _settle(node: Node, *folders: str | Path | None) -> None:
    """Finds what a path names; one that was typed as a flag is read from the current folder only."""
    if isinstance(node.value, str) and node.value:
        node.value = find_path(node.value, *(folders if node.origin == "file" else ()))
