"""Reads YAML documents and config files; every value has its position, for errors.

The dialect is PyYAML's YAML 1.1 without its pitfalls: ``3e-4`` and ``1E3`` are floats, ``010`` is ten, ``1:30`` and
``2024-01-01`` are text, keys are always text, and duplicate keys are errors. The reader works on PyYAML's nodes:
ruamel.yaml's round-trip tree drops the text of scalars and its node interface is the same, so it would shorten nothing.

Limits far above every real config stop hostile documents (deep nesting, aliases that expand to billions of values)
before they take time or memory.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from yaml.reader import ReaderError

from ingle.errors import ConfigError
from ingle.wording import nearest

Origin = Literal["file", "flag"]

#: Real configs have a few hundred bytes; parsing this many takes a few seconds.
_MAX_BYTES = 256 << 10
#: Levels of nesting.
_MAX_DEPTH = 40
#: Values after the expansion of aliases.
_MAX_VALUES = 100_000
#: Digits of an integer; 64 bits take 19.
_MAX_DIGITS = 100


@dataclass
class Node:
    """A value of a document.

    Attributes:
        value: A scalar, a list of nodes or a dict of nodes.
        origin: Whether it comes from a file or from a flag.
        where: ``run.yaml:12``, or the flag as typed.
        raw: The unparsed text of an unquoted scalar; None for containers and quoted text.
    """

    value: Any
    origin: Origin
    where: str
    raw: str | None = None

    def plain(self) -> Any:
        """Returns the value as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def find(self, path: Sequence[str | int]) -> Node | None:
        """Returns the node at ``path`` below this one, or None."""
        node: Node | None = self
        for key in path:
            if node is None:
                return None
            if isinstance(node.value, dict):
                node = node.value.get(str(key))
            elif isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
            else:
                return None
        return node


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with different types of plain scalars and a limit on nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Composes one node; PyYAML calls this recursively."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_DEPTH} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes all text that :class:`_Loader` would not read as text."""

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


def read_config(path: Path) -> str:
    """Returns the text of a config file.

    Raises:
        ConfigError: It does not exist, is not a regular file, is too large, or is not UTF-8.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError("The config is a pipe or a device.", where=str(path), fix="save it as a regular file")
            content = file.read(_MAX_BYTES + 1)
    except IsADirectoryError:
        raise _is_folder(path) from None
    except (FileNotFoundError, NotADirectoryError):
        raise _is_missing(path) from None
    except (OSError, ValueError) as error:  # a ValueError means a NUL in the path
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError("The config file cannot be read.", where=str(path), why=why) from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(
            "The config file is too large.",
            where=str(path),
            why=f"it has {status.st_size:,} bytes; the limit is {_MAX_BYTES:,}",
            fix="name a YAML file with options; name data files in data.sources",
        )
    return _decode(content, path)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would block forever


def _decode(content: bytes, path: Path) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        why = "it is UTF-16"
    else:
        try:
            return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            why = f"line {line} contains the byte 0x{content[error.start]:02x}"
    raise ConfigError("The config file is not UTF-8 text.", where=str(path), why=why, fix="save it as UTF-8")


def _is_folder(path: Path) -> ConfigError:
    fix = None
    if (path / "run.yaml").exists():
        fix = f"ingle train --resume {path} resumes the run in it; its config is {path / 'run.yaml'}"
    elif found := sorted(str(entry) for entry in path.glob("*.y*ml")):
        fix = f"name a file in it: {', '.join(found[:5])}"
    return ConfigError("The config is a folder, not a YAML file.", where=str(path), fix=fix)


def _is_missing(path: Path) -> ConfigError:
    found = [str(entry) for entry in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
    found += [str(entry) for entry in sorted(Path().glob(f"*/{path.name}")) + sorted(Path().glob(f"*/*/{path.name}"))]
    near = nearest(str(path), found, 0.7) or next((name for name in found if Path(name).name == path.name), None)
    fix = f"did you mean {near}?" if near else f"there are {', '.join(found[:5])}" if found else None
    return ConfigError("The config file does not exist.", where=str(path), fix=fix)


def read_document(text: str, name: str) -> Node:
    """Parses a YAML document; ``name`` is the file name in positions and errors.

    Raises:
        ConfigError: It is not valid YAML, has duplicate keys, or exceeds a limit.
    """
    return _Reader("file", name, lambda mark: f"{name}:{mark.line + 1}").read(text)


def read_value(text: str, where: str) -> Node:
    """Parses the value of a flag as YAML.

    Raises:
        ConfigError: It is not valid YAML.
    """
    if not text.strip():
        return Node("", "flag", where, raw=text)
    return _Reader("flag", where, lambda mark: where).read(text)


class _Reader:
    """Converts one document into nodes; ``place`` turns PyYAML's mark into a position for errors."""

    def __init__(self, origin: Origin, name: str, place: Callable[[yaml.Mark], str]) -> None:
        self._origin, self._name, self._place = origin, name, place
        self._num_values = 0

    def read(self, text: str) -> Node:
        try:
            loader = _Loader(text)
            try:
                root = loader.get_single_node()
                return self._convert(loader, root, ()) if root is not None else Node(None, self._origin, self._name)
            finally:
                loader.dispose()
        except ReaderError as error:
            line = text.count("\n", 0, error.position)
            mark = yaml.Mark(self._name, error.position, line, 0, text, error.position)
            raise self._invalid(mark, f"the character U+{ord(text[error.position]):04X} is not allowed") from error
        except yaml.YAMLError as error:
            found = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            raise self._invalid(found, getattr(error, "problem", None) or str(error)) from error

    def _invalid(self, mark: yaml.Mark | None, why: str) -> ConfigError:
        return ConfigError(
            "This is not valid YAML.",
            where=self._place(mark) if mark is not None else self._name,
            why=why,
            fix="check indentation, quotes and brackets; put text with ': ' or '#' in quotes",
        )

    def _convert(self, loader: yaml.SafeLoader, node: yaml.Node, outer: tuple[yaml.Node, ...]) -> Node:
        where = self._place(node.start_mark)
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise ConfigError(
                f"The document has more than {_MAX_VALUES:,} values.",
                where=where,
                why="aliases count with all values that they expand to",
                fix="write fewer values; select many files by a pattern such as `data/*.jsonl`",
            )
        if any(node is above for above in outer):
            raise ConfigError("A YAML alias contains itself.", where=where, fix="write the value out")
        if node.tag not in _TAGS:
            raise ConfigError(f"The YAML tag {node.tag} is not supported.", where=where, fix="write a plain value")
        if isinstance(node, yaml.MappingNode):
            return Node(self._table(loader, node, (*outer, node)), self._origin, where)
        if isinstance(node, yaml.SequenceNode):
            items = [self._convert(loader, item, (*outer, node)) for item in node.value]
            return Node(items, self._origin, where)
        is_plain = isinstance(node, yaml.ScalarNode) and not node.style
        return Node(self._scalar(loader, node, where), self._origin, where, raw=node.value if is_plain else None)

    def _scalar(self, loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
        if node.tag in _KEYS_ONLY:  # ``<<`` and ``=`` are special only as keys
            return node.value
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MAX_DIGITS:
            raise ConfigError(
                f"This number has {len(node.value):,} digits.", where=where, fix="write at most 18 digits"
            )
        try:
            value = loader.construct_object(node, deep=True)
        except (ValueError, KeyError, IndexError) as error:  # from explicit tags only: ``!!int abc``
            kind = node.tag.rpartition(":")[2]
            raise ConfigError(
                f"{clip(repr(node.value))} does not fit the tag !!{kind}.", where=where, fix="write a plain value"
            ) from error
        if isinstance(value, str):
            _check_text(value, where)
        return value

    def _table(self, loader: yaml.SafeLoader, node: yaml.MappingNode, outer: tuple[yaml.Node, ...]) -> dict[str, Node]:
        table: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self._place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError("A key must be a word.", where=where)
            value = self._convert(loader, value_node, outer)
            if key_node.tag == "tag:yaml.org,2002:merge":
                for part in value.value if isinstance(value.value, list) else [value]:
                    for name, inherited in part.value.items() if isinstance(part.value, dict) else ():
                        merged.setdefault(name, inherited)
                continue
            _check_text(key_node.value, where)
            if key_node.value in table:
                raise ConfigError(
                    f"The key {clip(repr(key_node.value))} is given twice in one section.",
                    where=where,
                    why=f"the first is at {table[key_node.value].where}",
                    fix="keep one of them",
                )
            value.where = where
            table[key_node.value] = value
        return {**merged, **table}


def _check_text(text: str, where: str) -> None:
    """Raises for NUL, which no option needs, and for lone surrogates, which UTF-8 cannot encode."""
    invalid = next((char for char in text if char == "\0" or "\ud800" <= char <= "\udfff"), None)
    if invalid is not None:
        raise ConfigError(
            f"A text contains the character U+{ord(invalid):04X}, which no option accepts.",
            where=where,
            fix="remove it" if invalid == "\0" else "write the character itself, without \\u escapes",
        )


def clip(text: str) -> str:
    """Shortens a text to at most 60 characters, for messages."""
    return text if len(text) <= 60 else text[:57] + "..."


def write_value(value: Any) -> str:
    """Writes a plain value as one line of YAML, which :func:`read_value` reads back."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")
