"""Where each value of a resolved run comes from: the default, the file or a flag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ingle.config.document import Node, write_value
from ingle.config.section import Section

Origin = Literal["default", "file", "flag"]


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every option of a resolved section in plain data, with its path; a list of plain values is one leaf."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, value


def trace(section: Section, root: Node) -> dict[str, Origin]:
    """The origin of each option of ``section``, which was made from the document ``root``."""
    found: dict[str, Origin] = {}
    for path, _ in leaves(section.model_dump(mode="json")):
        found[".".join(path)] = _origin(root, path)
    return found


def _origin(root: Node, path: tuple[str, ...]) -> Origin:
    node = root
    for key in path:
        below = node.value.get(key) if isinstance(node.value, dict) else node.value[int(key)]
        if below is None:
            return "default"
        node = below
    items = node.value if isinstance(node.value, list) else []
    return "flag" if any(item.origin == "flag" for item in items) else node.origin


def to_yaml(section: Section, comments: Mapping[str, str] | None = None) -> str:
    """A section as YAML, one option a line, that reads back as exactly the same section.

    Args:
        section: What to write.
        comments: What to put behind an option, by dotted path.
    """
    return "\n".join(_lines(section.model_dump(mode="json"), "", "", comments or {})) + "\n"


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
