"""A YAML document whose every value knows the line it stands on.

The dialect is YAML 1.1 as PyYAML reads it, less its traps: ``3e-4`` and ``1E3`` are floats, ``010`` is ten, ``1:30``
and ``2024-01-01`` are text, a key is always text, and a key that stands twice is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from ingle.errors import ConfigError

Origin = Literal["file", "flag"]


@dataclass
class Node:
    """A value of a document.

    Attributes:
        value: A scalar, a list of nodes or a dict of nodes.
        origin: Whether a file or a flag gave it.
        where: ``run.yaml:12`` or the flag as typed.
        raw: A scalar as it was written; None for containers and for quoted text.
    """

    value: Any
    origin: Origin
    where: str
    raw: str | None = None

    def plain(self) -> Any:
        """The value without lines: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with its own table of what a plain scalar means."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever :class:`_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_INTEGER = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|[0-9]+(?:_[0-9]+)*)\Z")
_FLOAT = re.compile(
    r"""(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?
       |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
       |[-+]?\.(?:inf|Inf|INF)
       |\.(?:nan|NaN|NAN))\Z""",
    re.VERBOSE,
)
_REPLACED = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"}
_KEYS_ONLY = {"tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}
_TAGS = _KEYS_ONLY | {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


def _set_up(dialect: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    table = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in _REPLACED]
        for first, entries in dialect.yaml_implicit_resolvers.items()
    }
    dialect.yaml_implicit_resolvers = table
    dialect.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    dialect.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16) if "x" in text else int(text)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_set_up(_Loader)
_set_up(_Dumper)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Dumper.add_representer(str, _text)


def read_document(text: str, name: str) -> Node:
    """Reads one YAML document from a file.

    Raises:
        ConfigError: It is not YAML, a key stands twice, or it refers to itself.
    """
    return _read(text, "file", lambda mark: f"{name}:{mark.line + 1}", name)


def read_value(text: str, where: str) -> Node:
    """Reads the value of a flag, as YAML.

    Raises:
        ConfigError: It is not YAML.
    """
    if not text.strip():
        return Node("", "flag", where, raw=text)
    return _read(text, "flag", lambda mark: where, where)


def _read(text: str, origin: Origin, place: Any, name: str) -> Node:
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            return _convert(loader, root, origin, place, ()) if root is not None else Node(None, origin, name)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            "This is not valid YAML.",
            where=place(mark) if mark is not None else name,
            why=problem,
            fix="check indentation, quotes and brackets there; put text with ': ' or '#' in quotes",
        ) from error


def _convert(
    loader: yaml.SafeLoader, node: yaml.Node, origin: Origin, place: Any, outer: tuple[yaml.Node, ...]
) -> Node:
    where = place(node.start_mark)
    if any(node is above for above in outer):
        raise ConfigError("A YAML alias contains itself.", where=where, fix="write the value out")
    if node.tag not in _TAGS:
        raise ConfigError(f"The YAML tag {node.tag} is not read here.", where=where, fix="write a plain value")
    if isinstance(node, yaml.MappingNode):
        return Node(_table(loader, node, origin, place, (*outer, node)), origin, where)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(loader, item, origin, place, (*outer, node)) for item in node.value]
        return Node(items, origin, where)
    # A lone ``<<`` or ``=`` means something as a key only.
    value = node.value if node.tag in _KEYS_ONLY else loader.construct_object(node, deep=True)
    is_plain = isinstance(node, yaml.ScalarNode) and not node.style
    return Node(value, origin, where, raw=node.value if is_plain else None)


def _table(
    loader: yaml.SafeLoader, node: yaml.MappingNode, origin: Origin, place: Any, outer: tuple[yaml.Node, ...]
) -> dict[str, Node]:
    table: dict[str, Node] = {}
    merged: dict[str, Node] = {}
    for key_node, value_node in node.value:
        where = place(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("A key must be a word.", where=where)
        value = _convert(loader, value_node, origin, place, outer)
        if key_node.tag == "tag:yaml.org,2002:merge":
            for part in value.value if isinstance(value.value, list) else [value]:
                merged = {**(part.value if isinstance(part.value, dict) else {}), **merged}
            continue
        if key_node.value in table:
            raise ConfigError(
                f"The key {key_node.value!r} stands twice in one section.",
                where=where,
                why=f"the first is at {table[key_node.value].where}",
                fix="keep one of them",
            )
        value.where = where
        table[key_node.value] = value
    return {**merged, **table}


def write_value(value: Any) -> str:
    """A plain value on one line, as YAML that :func:`read_value` reads back."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")
