"""Reports everything that is wrong with a config in one error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ingle.config.document import Node, clip, write_value
from ingle.config.schema import Choice, Leaf, Names, Rows, Shape, Table, options, shapes
from ingle.config.section import Section
from ingle.errors import ConfigError
from ingle.wording import either, nearest

#: Longest list of problems or options in a message.
_LISTED = 12

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        message: A sentence.
        where: The option, with the line or flag that set it.
        fix: What to type instead.
    """

    message: str
    where: str | None = None
    fix: str | None = None


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises one error for all problems; does nothing if there are none.

    Raises:
        ConfigError: With all of ``problems``.
    """
    if not problems:
        return
    if len(problems) == 1:
        raise ConfigError(problems[0].message, where=problems[0].where, fix=problems[0].fix)
    lines = [f"The config has {len(problems):,} problems."]
    for number, problem in enumerate(problems[:_LISTED], 1):
        lines.append(f"  {number}. {problem.message}")
        lines.extend(
            f"     {label:<6} {text}" for label, text in (("where", problem.where), ("fix", problem.fix)) if text
        )
    if len(problems) > _LISTED:
        lines.append(f"  ... and {len(problems) - _LISTED:,} more.")
    raise ConfigError("\n".join(lines))


def dotted(path: Iterable[str | int]) -> str:
    """Returns a path as in flags, with long names clipped."""
    return ".".join(clip(str(key)) for key in path)


def option_path(loc: Path, section: type[Section]) -> tuple[Path, Shape | None]:
    """Returns the path and shape of the option at a pydantic location.

    The path has no names of union members, and ends at a list for an invalid item in it.
    """
    shape: Shape | None = Table(section)
    path: list[str | int] = []
    rest = list(loc)
    while rest:
        key = rest.pop(0)
        match shape:
            case Choice(_, members, _):
                shape = Table(members[str(key)])
                continue
            case Table(inner):
                shape = shapes(inner).get(str(key))
            case Rows(item):
                shape = item
            case Names():
                shape = Leaf("text")
            case _:
                break
        path.append(key)
    return tuple(path), shape


def translate(error: ValidationError, root: Node, section: type[Section]) -> list[Problem]:
    """Translates pydantic's errors, one per option."""
    found: dict[Path, Problem] = {}
    for detail in error.errors(include_url=False):
        path, shape = option_path(detail["loc"], section)
        node = root.find(path)
        # Pydantic does not count invalid rows, and then reports that the list is too short.
        counted = isinstance(shape, Rows) and detail["type"] == "too_short" and node is not None and bool(node.value)
        if path in found or counted:
            continue
        # Suggestions take time; compute them only for the problems that are shown.
        listed = len(found) < _LISTED
        found[path] = _translate(detail, path, shape, root, section) if listed else Problem(dotted(path))
    return list(found.values())


def _translate(detail: ErrorDetails, path: Path, shape: Shape | None, root: Node, section: type[Section]) -> Problem:
    node = root.find(path)
    name = dotted(path)
    where = _where(name, node)
    if detail["type"] == "extra_forbidden":
        return Problem(f"{name} is not an option.", where, _suggestion(path, root, section))
    if detail["type"] == "missing" and node is None:
        needed = " and ".join(dotted((*path, *rest)) for rest in _required(shape))
        return Problem(f"{needed} must be given.", None, f"add it to the file, or use --{needed.split(' ')[0]}=VALUE")
    if isinstance(shape, Choice) and detail["type"].startswith("union_tag"):
        tag = root.find((*path, shape.tag))
        choices = either(list(shape.members))
        if tag is None and node is not None and isinstance(node.value, dict):
            typo = nearest(shape.tag, node.value)
            remedy = f"--{name}.{shape.tag}=..." if typo is None else f"write {shape.tag} instead of {typo}"
            return Problem(f"{name}.{shape.tag} must be given: {choices}.", where, remedy)
        shown = tag or node
        return Problem(
            f"{name}.{shape.tag} must be {choices}{_shown(shown)}.",
            _where(f"{name}.{shape.tag}", shown),
            _closest(shown, list(shape.members)),
        )
    if detail["type"] in ("string_too_short", "too_short") and node is not None and not node.value:
        return Problem(f"{name} is empty.", where)
    if isinstance(shape, Leaf):
        fix = _closest(node, [*shape.alone, *shape.listed])
        return Problem(f"{name} must be {shape.words}{_shown(node)}.", where, fix)
    fix = _without(path, section) if node is not None and node.value is None else None
    if isinstance(shape, Table):
        needed = next((dotted((*path, *rest)) for rest in _required(shape)), f"{name}.OPTION")
        fix = f"--{needed}={write_value(node.value) if node is not None and isinstance(node.value, str) else 'VALUE'}"
    return Problem(f"{name} must be {_container_words(shape)}{_shown(node)}.", where, fix)


def _without(path: Path, section: type[Section]) -> str | None:
    """Returns how to do without the innermost section around an option that can be left out."""
    for size in range(len(path) - 1, 0, -1):
        _, around = option_path(path[: size - 1], section)
        if isinstance(around, Table) and around.section.model_fields[str(path[size - 1])].default is None:
            return f"--{dotted(path[:size])}=null"
    return None


def _required(shape: Shape | None) -> list[Path]:
    """Returns the required options below ``shape``, as relative paths."""
    match shape:
        case Table(section):
            below = shapes(section)
            needed = [name for name, field in section.model_fields.items() if field.is_required()]
            return [(name, *rest) for name in needed for rest in _required(below[name])]
        case _:
            return [()]


def _container_words(shape: Shape | None) -> str:
    match shape:
        case Rows(_):
            return "a list of sections, or of text"
        case Names():
            return "a mapping of names to text"
        case _:
            return "a section"


def _where(name: str, node: Node | None) -> str:
    if node is None:
        return name
    return node.where if node.origin == "flag" else f"{name} ({node.where})"


def _shown(node: Node | None) -> str:
    if node is None:
        return ""
    if isinstance(node.value, dict | list) and _is_long(node):
        return f", not {'a section' if isinstance(node.value, dict) else 'a list'} of {len(node.value):,}"
    # Show a number as typed: 1e400, not infinity.
    is_number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
    text = node.raw if node.raw is not None and is_number else write_value(node.plain())
    return f", not {clip(text)}"


def _is_long(node: Node) -> bool:
    """Returns whether a container has too many values to show."""
    waiting, seen = [node], 0
    while waiting and seen <= _LISTED:
        value = waiting.pop().value
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        seen += 1
    return seen > _LISTED


def _closest(node: Node | None, choices: list[str]) -> str | None:
    given = node.plain() if node is not None else None
    for word in given if isinstance(given, list) else [given]:
        if isinstance(word, str) and word not in choices:
            close = nearest(clip(word).lower().replace("-", "_"), choices)
            if close:
                return f"did you mean {close}?"
    return None


def _suggestion(path: Path, root: Node, section: type[Section]) -> str | None:
    """Suggests an option for an unknown one: first from the same section, then from the entire tree."""
    parent, key = dotted(path[:-1]), clip(str(path[-1])).replace("-", "_")
    prefix = f"{parent}." if parent else ""
    _, shape = option_path(path[:-1], section)
    match shape:
        case Choice(tag, members, _):
            owners = [name for name, member in members.items() if key in member.model_fields]
            if owners:
                return f"it belongs to {parent}.{tag}={either(owners)}"
            sections = shape.candidates(root.find(path[:-1]))
            siblings = list(dict.fromkeys(field for section in sections for field in section.model_fields))
        case Table(inner):
            siblings = list(inner.model_fields)
        case _:
            siblings = []
    if close := nearest(key, siblings):
        return f"did you mean {prefix}{close}?"
    everywhere = [option.path for option in options(section)]
    named = [found for found in everywhere if found.rpartition(".")[2] == key]
    if not named:
        near = nearest(key, sorted({found.rpartition(".")[2] for found in everywhere}), 0.75)
        named = [found for found in everywhere if found.rpartition(".")[2] == near]
    if named:
        return f"did you mean {either(named[:3])}?"
    known = f"the options {f'of {parent} ' if parent else ''}are {', '.join(siblings)}"
    return known if 0 < len(siblings) <= _LISTED else None
