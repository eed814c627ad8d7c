"""Describes the config tree: the shape, type and description of every option.

Descriptions are written once, in the sections' ``Attributes:``. Errors, the JSON Schema and the reference pages read
them from here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from ingle.config.document import Node, write_value
from ingle.config.run import Run
from ingle.config.section import Section
from ingle.wording import either


@dataclass(frozen=True)
class Leaf:
    """An option with a value.

    Attributes:
        words: The accepted values, in plain words.
        is_flag: Whether true and false are accepted, so that ``--train.imatrix`` alone means true.
        alone: The fixed words that are accepted.
        listed: The fixed words that are accepted in a list.
        items: The default if it is a list; None if no list is accepted.
        is_open: Whether a list of any length is accepted, so that a single item means a list of one.
    """

    words: str
    is_flag: bool = False
    alone: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    items: tuple[Any, ...] | None = None
    is_open: bool = False


@dataclass(frozen=True)
class Table:
    """One section."""

    section: type[Section]


@dataclass(frozen=True)
class Choice:
    """One of several sections, distinguished by ``tag``; ``default`` is the tag of a section without one."""

    tag: str
    members: dict[str, type[Section]]
    default: str | None

    def candidates(self, node: Node | None) -> list[type[Section]]:
        """Returns the section that a node selects, or all members if it selects none."""
        chosen = node.find((self.tag,)) if node is not None else None
        name = self.default if chosen is None else chosen.value
        return [self.members[name]] if isinstance(name, str) and name in self.members else list(self.members.values())


@dataclass(frozen=True)
class Rows:
    """A list of sections; a text means a section with only ``key``."""

    item: Table | Choice
    key: str = "path"


@dataclass(frozen=True)
class Names:
    """A mapping of free names to text."""


Shape = Leaf | Table | Choice | Rows | Names


@dataclass(frozen=True)
class Option:
    """One option in the reference.

    Attributes:
        path: Dotted path; ``N`` is a position in a list.
        type: The accepted values, in plain words.
        default: The default as YAML; None if the option is required.
        description: The description in the section's docstring.
        when: The choice that it belongs to (``adapter.kind = lora``); None if it always exists.
    """

    path: str
    type: str
    default: str | None
    description: str
    when: str | None = None


@cache
def shapes(section: type[Section]) -> Mapping[str, Shape]:
    """Returns the shape of each field of ``section``; cached, because resolving type hints is slow."""
    hints = get_type_hints(section, include_extras=True)
    return {name: _shape(hints[name], section.model_fields[name]) for name in section.model_fields}


def _shape(hint: Any, field: FieldInfo) -> Shape:
    if (container := _container(hint)) is not None:
        return container
    options = [option for option in _options(_unwrap(hint)[0]) if option is not NoneType]
    if len(options) == 1:
        inner, _ = _unwrap(options[0])
        if get_origin(inner) is tuple and (item := _container(get_args(inner)[0])) is not None:
            return Rows(item)
        if get_origin(inner) is dict:
            return Names()
    return _leaf(hint, [_unwrap(option)[0] for option in options], field)


def _container(hint: Any) -> Table | Choice | None:
    """Returns the shape of a section, or of one of several sections; None for other types."""
    bare, metadata = _unwrap(hint)
    sections = [_unwrap(option)[0] for option in _options(bare) if option is not NoneType]
    if not sections or not all(_is_section(section) for section in sections):
        return None
    if len(sections) == 1:
        return Table(sections[0])
    tag = next(str(info.discriminator) for info in metadata if isinstance(info, FieldInfo) and info.discriminator)
    return Choice(tag, {_tag_of(section, tag): section for section in sections}, _filled_in(metadata, tag))


def _leaf(hint: Any, kinds: list[Any], field: FieldInfo) -> Leaf:
    lists = [kind for kind in kinds if get_origin(kind) is tuple]
    default = field.default if isinstance(field.default, tuple) else ()
    return Leaf(
        describe_type(hint),
        is_flag=bool in kinds,
        alone=_literals(kinds),
        listed=_literals(_unwrap(get_args(kind)[0])[0] for kind in lists),
        items=default if lists else None,
        is_open=any(get_args(kind)[-1] is Ellipsis for kind in lists),
    )


def _literals(kinds: Iterable[Any]) -> tuple[str, ...]:
    return tuple(str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))


def _filled_in(metadata: list[Any], tag: str) -> str | None:
    """Returns the tag that :func:`ingle.config.section.tagged` adds to a section without one."""
    for info in metadata:
        if isinstance(info, BeforeValidator):
            fill: Callable[[dict[str, str]], dict[str, str]] = info.func  # type: ignore[assignment]
            return fill({}).get(tag)
    return None


def _is_section(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, Section)


def _tag_of(section: type[Section], tag: str) -> str:
    return str(get_args(section.model_fields[tag].annotation)[0])


def _unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """Returns the type inside ``Annotated`` and its metadata."""
    metadata: list[Any] = []
    while get_origin(hint) is Annotated:
        metadata.extend(hint.__metadata__)
        hint = get_args(hint)[0]
    return hint, metadata


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in metadata:
        for constraint in info.metadata if isinstance(info, FieldInfo) else ():
            found |= {name: getattr(constraint, name) for name in ("ge", "gt", "le", "lt") if hasattr(constraint, name)}
    return found


def describe_type(hint: Any) -> str:
    """Describes the values of a type in plain words: ``an integer of at least 1 or null``."""
    return either(_words(hint))


def _words(hint: Any) -> list[str]:
    bare, metadata = _unwrap(hint)
    options = _options(bare)
    if len(options) > 1:
        return [words for option in sorted(options, key=lambda option: option is NoneType) for words in _words(option)]
    if get_origin(bare) is Literal:
        return [str(value) for value in get_args(bare)]
    if get_origin(bare) is tuple:
        items = get_args(bare)
        if items[-1] is not Ellipsis:
            return [f"a list of {len(items)}, each {describe_type(items[0])}"]
        inner = describe_type(items[0])
        return ["a list of text" if inner == "text" else f"a list of any of {inner.replace(' or ', ', ')}"]
    if bare in (int, float):
        signs = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
        limits = [f"{signs[name]} {limit:,}" for name, limit in _bounds(metadata).items()]
        return [" ".join(["an integer" if bare is int else "a number", " and ".join(limits)]).strip()]
    return {str: ["text"], bool: ["true", "false"], NoneType: ["null"]}[bare]


def docstring(section: type[Section]) -> tuple[str, dict[str, str]]:
    """Returns the summary of a section and the description of each attribute, inherited ones included."""
    described: dict[str, str] = {}
    for parent in reversed([cls for cls in section.__mro__ if _is_section(cls) and cls is not Section]):
        described |= _attributes(inspect.cleandoc(parent.__doc__ or ""))
    summary = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0]
    return _join(summary), described


def _attributes(text: str) -> dict[str, str]:
    """Returns the entries of a docstring's ``Attributes:``, each on one line."""
    match = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    if match is None:
        return {}
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", match[1], re.MULTILINE)
    return {name: _join(body) for name, body in entries}


def _join(text: str) -> str:
    return " ".join(text.split())


def options(section: type[Section] = Run) -> list[Option]:
    """Returns every option below ``section``, in the order of the sections."""
    return list(_walk(section, "", None))


def _walk(section: type[Section], prefix: str, when: str | None) -> Iterator[Option]:
    _, described = docstring(section)
    for name, shape in shapes(section).items():
        path, field = prefix + name, section.model_fields[name]
        default = _default(field)
        description = described.get(name, "")
        match shape:
            case Table(inner):
                if field.default is None:
                    yield Option(path, "a section or null", default, description or docstring(inner)[0], when)
                yield from _walk(inner, path + ".", when)
            case Choice(tag):
                yield from _walk_members(shape, path, getattr(field.default, tag, None), description, when)
            case Rows(item):
                yield Option(path, "a list of sections, or of text", default, description, when)
                if isinstance(item, Table):
                    yield from _walk(item.section, path + ".N.", when)
                else:
                    yield from _walk_members(item, path + ".N", item.default, "", when)
            case Names():
                yield Option(path, "a mapping of names to text", default, description, when)
            case Leaf(words):
                yield Option(path, words, default, description, when)


def _walk_members(
    choice: Choice, path: str, default: str | None, description: str, when: str | None
) -> Iterator[Option]:
    texts = [f"``{member}``: {docstring(inner)[0]}" for member, inner in choice.members.items()]
    name = f"{path}.{choice.tag}"
    yield Option(name, either(list(choice.members)), default, " ".join([description, *texts]).strip(), when)
    for member, inner in choice.members.items():
        for option in _walk(inner, path + ".", f"{name} = {member}"):
            if option.path != name:
                yield option


def _default(field: FieldInfo) -> str | None:
    value = field.get_default(call_default_factory=True)
    if field.is_required() or isinstance(value, Section):
        return None
    return write_value(list(value) if isinstance(value, tuple) else value)


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema (2020-12) of a config file, with the description of every option."""
    schema = Run.model_json_schema()
    found = {cls.__name__: cls for cls in _sections(Run)}
    for name, part in [(Run.__name__, schema), *schema.get("$defs", {}).items()]:
        if name not in found:
            continue
        summary, described = docstring(found[name])
        part["description"] = summary
        for key, field in part.get("properties", {}).items():
            field.pop("title", None)
            if key in described:
                field["description"] = described[key]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for shape in shapes(section).values():
        match shape.item if isinstance(shape, Rows) else shape:
            case Table(inner):
                yield from _sections(inner)
            case Choice(_, members, _):
                for inner in members.values():
                    yield from _sections(inner)
            case _:
                pass
