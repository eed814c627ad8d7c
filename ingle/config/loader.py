"""Loads a YAML file and flags into a frozen, checked :class:`~ingle.config.run.Run`, and writes it as YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from ingle.config.document import Node, read_config, read_document, write_value
from ingle.config.evaluate import EvaluateConfig, TaskConfig
from ingle.config.overrides import apply_overrides, drop_ignored, expand_short_forms, read_overrides
from ingle.config.paths import expand, find_path, is_path
from ingle.config.problems import Problem, option_path, raise_problems, translate
from ingle.config.rules import find_violations
from ingle.config.run import Run
from ingle.config.schema import Choice, Rows, Shape, Table, shapes
from ingle.config.section import Section
from ingle.errors import ConfigError

S = TypeVar("S", bound=Section)
Origin = Literal["default", "file", "flag"]


@dataclass(frozen=True)
class LoadedRun:
    """A run and where its values come from.

    Attributes:
        run: The resolved run.
        origins: ``default``, ``file`` or ``flag`` for each dotted path; or a sentence about another origin.
        notes: Options that were ignored, one sentence each.
    """

    run: Run
    origins: Mapping[str, str]
    notes: list[str] = field(default_factory=list)


def load_run(path: Path | None, overrides: Sequence[str] = ()) -> LoadedRun:
    """Loads a config file and applies overrides.

    Args:
        path: A YAML file; None if the overrides give every required option.
        overrides: ``--a.b=c``, or ``--a.b`` and ``c`` as two words.

    Raises:
        ConfigError: With every problem that was found.
    """
    run, root, notes = _load(Run, path, overrides)
    return LoadedRun(run, _origins(run, root), notes)


def load_task(source: Path | TaskConfig | None, overrides: Sequence[str] = ()) -> TaskConfig:
    """Loads a task and applies overrides.

    Args:
        source: A task file, a run's config with an ``evaluate:`` section, a task, or None if the overrides give every
            required option.
        overrides: As in :func:`load_run`.

    Raises:
        ConfigError: With every problem that was found.
    """
    task, _, _ = _load(TaskConfig, source, overrides)
    return task


def run_from_yaml(text: str, name: str = "run.yaml") -> Run:
    """Parses the output of :func:`run_to_yaml`; ``name`` is the file name in errors.

    Raises:
        ConfigError: With every problem that was found.
    """
    return _build(Run, _mapping(read_document(text, name), name))


def run_to_yaml(run: Run) -> str:
    """Writes a run as YAML with every option; :func:`run_from_yaml` returns an equal run."""
    return to_yaml(run)


def to_yaml(section: Section, comments: Mapping[str, str] | None = None) -> str:
    """Writes a section as YAML, one option per line, which loads as an equal section.

    Args:
        section: The section.
        comments: Comments behind options, by dotted path.
    """
    return "\n".join(_lines(section.model_dump(mode="json"), "", "", comments or {})) + "\n"


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields path and value of every option in a section's plain data; a list of plain values is one option."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, value


def _lines(table: Mapping[str, Any], indent: str, prefix: str, comments: Mapping[str, str]) -> Iterator[str]:
    for key, value in table.items():
        path = f"{prefix}{key}"
        name = write_value(key)
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ", f"{path}.", comments)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{indent}{name}:"
            for index, item in enumerate(value):
                inner = list(_lines(item, indent + "    ", f"{path}.{index}.", comments))
                yield f"{indent}  - {inner[0].lstrip()}"
                yield from inner[1:]
        else:
            comment = f"  # {comments[path]}" if path in comments else ""
            yield f"{indent}{name}: {write_value(value)}{comment}"


def _origins(section: Section, root: Node) -> dict[str, Origin]:
    """Returns the origin of each option of ``section``, which was built from the document ``root``."""
    return {".".join(path): _origin(root, path) for path, _ in leaves(section.model_dump(mode="json"))}


def _origin(node: Node, path: tuple[str, ...]) -> Origin:
    for key in path:
        below = node.value.get(key) if isinstance(node.value, dict) else node.value[int(key)]
        if below is None:
            return "default"
        node = below
    items = node.value if isinstance(node.value, list) else []
    return "flag" if any(item.origin == "flag" for item in items) else node.origin


def _load(section: type[S], source: Path | S | None, overrides: Sequence[str]) -> tuple[S, Node, list[str]]:
    flags = read_overrides(overrides)
    root = Node({}, "flag", "the flags")
    path = source if isinstance(source, Path) else None
    started_in = None
    if path is not None:
        root = _mapping(read_document(read_config(path), str(path)), str(path))
        started_in = _text_at(root, "paths_from")
        if section is TaskConfig:
            root = _task_node(root, str(path))
    elif isinstance(source, Section):
        root = _mapping(read_document(to_yaml(source), "the task"), "the task")
    notes = apply_overrides(root, flags, section)
    expand_short_forms(root, Table(section))
    if section is Run:
        notes += drop_ignored(root)
    for node in _path_nodes(root, Table(section)):
        if isinstance(node.value, str) and node.value:
            folders = (path.parent if path is not None else None, started_in) if node.origin == "file" else ()
            node.value = find_path(node.value, *folders)
    if started_in is not None and section is not TaskConfig:
        del root.value["paths_from"]  # all paths are now relative to the current folder
    if (output := _text_at(root, "output")) is not None:
        root.value["output"].value = expand(output)
    return _build(section, root), root, notes


def _text_at(root: Node, name: str) -> str | None:
    node = root.value.get(name)
    return node.value if node is not None and isinstance(node.value, str) and node.value else None


def _mapping(root: Node, name: str) -> Node:
    if root.value is None:
        root.value = {}
    if not isinstance(root.value, dict):
        raise ConfigError("A config file must contain options such as `seed: 0`, one per line.", where=name)
    return root


def _task_node(root: Node, name: str) -> Node:
    """Returns the options of a task: those of the document, or those of its ``evaluate:`` section."""
    task = root.value.get("evaluate")
    if task is not None and task.value is not None:
        task = _mapping(task, name)
        for key in EvaluateConfig.model_fields.keys() - TaskConfig.model_fields.keys():
            task.value.pop(key, None)  # options of validation during training
        return task
    if task is not None or root.value.keys() & {"model", "data", "output"}:
        raise ConfigError(
            "This config has no task: the section `evaluate:` is missing.",
            where=name,
            fix="add `evaluate: {sources: [heldout.jsonl]}`, or name a task file",
        )
    return root


def _build(section: type[S], root: Node) -> S:
    expand_short_forms(root, Table(section))
    try:
        built = section.model_validate(root.plain())
    except ValidationError as error:
        if not _convert_scalars(error, root, section):
            raise_problems(translate(error, root, section))
        try:
            built = section.model_validate(root.plain())
        except ValidationError as remaining:
            raise_problems(translate(remaining, root, section))
            raise AssertionError("a validation error has at least one problem") from remaining
    raise_problems([_with_lines(problem, root) for problem in find_violations(built)])
    return built


def _convert_scalars(error: ValidationError, root: Node, section: type[Section]) -> bool:
    """Uses the unparsed text where text is needed (``revision: 123``), and integers in any notation (``1e3``)."""
    converted = False
    for detail in error.errors(include_url=False):
        path, _ = option_path(detail["loc"], section)
        tail = detail["loc"][-1]
        node = root.find(path)
        if node is not None and isinstance(node.value, list) and isinstance(tail, int) and tail < len(node.value):
            node = node.value[tail]
        if node is None:
            continue
        if detail["type"] == "string_type" and node.raw is not None and node.value is not None:
            node.value, converted = node.raw, True
        elif detail["type"] == "int_type" and isinstance(node.value, float) and node.value.is_integer():
            node.value, converted = int(node.value), True
    return converted


def _with_lines(problem: Problem, root: Node) -> Problem:
    """Adds to the options in ``where`` the lines that set them."""
    parts = []
    for name in (problem.where or "").split(", "):
        node = root.find([int(key) if key.isdigit() else key for key in name.split(".")])
        parts.append(name if node is None or node.origin == "flag" else f"{name} ({node.where})")
    return Problem(problem.message, ", ".join(parts), problem.fix)


def _path_nodes(node: Node, shape: Shape) -> Iterator[Node]:
    """Yields the nodes of all options that are paths."""
    match shape:
        case Table(section) if isinstance(node.value, dict):
            for name, inner in shapes(section).items():
                if (below := node.value.get(name)) is not None:
                    if is_path(section, name):
                        yield below
                    yield from _path_nodes(below, inner)
        case Rows(item) if isinstance(node.value, list):
            for below in node.value:
                yield from _path_nodes(below, item)
        case Choice():
            for section in shape.candidates(node):
                yield from _path_nodes(node, Table(section))
        case _:
            pass
