"""Applies flags such as ``--optim.lr=1e-4`` to a config document, and drops options that have no effect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.config.document import Node, clip, read_value, write_value
from ingle.config.schema import Choice, Leaf, Rows, Shape, Table, shapes
from ingle.config.section import Section
from ingle.errors import ConfigError

#: Keys of a dotted path; the deepest option has four.
_MAX_KEYS = 16
#: Options that have no effect where another one is set.
_DISABLED_BY = (("train.num_epochs", "train.num_steps"), ("optim.warmup_ratio", "optim.warmup_steps"))


@dataclass(frozen=True)
class Override:
    """A flag: its dotted path and its value; ``text`` is None without a value."""

    keys: tuple[str, ...]
    text: str | None

    @property
    def typed(self) -> str:
        """The flag as typed on a command line."""
        return "--" + ".".join(map(clip, self.keys)) + ("" if self.text is None else f"={clip(self.text)}")


def read_overrides(words: Sequence[str]) -> list[Override]:
    """Parses command-line words: ``--a.b=c``, ``--a.b c`` or ``--a.b`` alone.

    Raises:
        ConfigError: A word is neither a flag nor the value of a flag.
    """
    found: list[Override] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.partition("=")
        keys = tuple(name.removeprefix("--").split("."))
        if not word.startswith("--") or not all(keys):
            fix = f"--{word}" if equals and all(keys) and not word.startswith("-") else "--section.option=value"
            raise ConfigError(f"{clip(word)!r} is not an override.", fix=f"write overrides as {fix}")
        if len(keys) > _MAX_KEYS:
            raise ConfigError(f"{clip(name)} is not an option.", why=f"no option is nested {len(keys):,} levels deep")
        if equals:
            found.append(Override(keys, text))
        elif rest and not rest[0].startswith("--"):
            found.append(Override(keys, rest.pop(0)))
        else:
            found.append(Override(keys, None))
    return found


def apply_overrides(root: Node, overrides: Sequence[Override], section: type[Section]) -> list[str]:
    """Applies overrides to a document in place.

    Returns:
        A sentence for each option of the file that was dropped because a flag selects another kind of section.

    Raises:
        ConfigError: A flag names an option below a single value, or a position beyond the end of a list.
    """
    shape: Shape = Table(section)
    for override in overrides:
        _put(root, shape, override)
    return _drop_replaced(root, section)


def _put(root: Node, shape: Shape | None, override: Override) -> None:
    node = root
    for position, key in enumerate(override.keys[:-1]):
        node, shape = _step(node, shape, key, override, position)
    last = override.keys[-1]
    target = _part_shape(_open(node, shape, override, len(override.keys) - 1), shape, last)
    value = _value(override, target)
    if isinstance(target, Choice) and not isinstance(value.value, dict):
        # ``--adapter=none``: the value is the tag; options of the old tag are dropped afterwards.
        below, _ = _step(node, shape, last, override, len(override.keys) - 1)
        below.value[target.tag] = value
    elif isinstance(node.value, list):
        index = _index(node.value, last, override)
        node.value[index : index + 1] = [value]
    else:
        node.value[last] = value


def _value(override: Override, target: Shape | None) -> Node:
    if override.text is not None:
        return read_value(override.text, override.typed)
    if isinstance(target, Leaf) and target.is_flag:
        return Node(True, "flag", override.typed)
    raise ConfigError(
        f"{override.typed} needs a value.",
        why=f"it accepts {target.words}" if isinstance(target, Leaf) else None,
        fix=f"{override.typed}=VALUE",
    )


def _step(node: Node, shape: Shape | None, key: str, override: Override, position: int) -> tuple[Node, Shape | None]:
    """Returns the node below ``key`` and its shape; creates the node if it is missing."""
    container = _open(node, shape, override, position)
    below = _part_shape(container, shape, key)
    empty = _empty(below, override.typed)
    if isinstance(container.value, list):
        index = _index(container.value, key, override)
        if index == len(container.value):
            container.value.append(empty)
        return container.value[index], below
    found = container.value.get(key)
    if found is None or found.value is None:
        container.value[key] = found = empty
    return found, below


def _empty(shape: Shape | None, typed: str) -> Node:
    match shape:
        case Rows(_):
            return Node([], "flag", typed)
        case Leaf(items=items) if items is not None:
            return Node([Node(item, "flag", typed) for item in items], "flag", typed)
        case _:
            return Node({}, "flag", typed)


def _open(node: Node, shape: Shape | None, override: Override, position: int) -> Node:
    """Expands a short form (``sources: a.jsonl``), so that the options below it can be set."""
    expand_short_forms(node, shape)
    if not isinstance(node.value, dict | list):
        path = ".".join(override.keys[:position])
        why = f"it is {write_value(node.plain())} ({node.where})"
        raise ConfigError(f"{path} is not a section or a list.", where=override.typed, why=why)
    return node


def _part_shape(node: Node, shape: Shape | None, key: str) -> Shape | None:
    match shape:
        case Table(section):
            return shapes(section).get(key)
        case Rows(item):
            return item
        case Choice():
            return next((found for member in shape.candidates(node) if (found := shapes(member).get(key))), None)
        case _:
            return None


def _index(items: list[Node], key: str, override: Override) -> int:
    if not re.fullmatch("[0-9]{1,9}", key) or int(key) > len(items):
        raise ConfigError(
            f"{clip(key)!r} is not a position in a list of {len(items)}.",
            where=override.typed,
            fix=f"positions start at 0; {len(items)} appends an item",
        )
    return int(key)


def expand_short_forms(node: Node, shape: Shape | None) -> None:
    """Expands short forms in place: a word for a tagged section, an item for a list of one, a text for a row."""
    match shape:
        case Table(section) if not isinstance(node.value, dict | None) and section.short_for(node.value):
            key = section.short_for(node.value)
            node.value, node.raw = {key: Node(node.value, node.origin, node.where, node.raw)}, None
            expand_short_forms(node, shape)
        case Choice(tag):
            if isinstance(node.value, str):
                node.value, node.raw = {tag: Node(node.value, node.origin, node.where, node.raw)}, None
            if len(selected := shape.candidates(node)) == 1:
                expand_short_forms(node, Table(selected[0]))
        case Rows(item, key):
            if isinstance(node.value, str | dict):
                node.value, node.raw = [Node(node.value, node.origin, node.where, node.raw)], None
            for row in node.value if isinstance(node.value, list) else ():
                if isinstance(row.value, str):
                    row.value, row.raw = {key: Node(row.value, row.origin, row.where, row.raw)}, None
                expand_short_forms(row, item)
        case Leaf(is_open=True, alone=alone) if node.value is not None and not isinstance(node.value, list | dict):
            if node.value not in alone:
                node.value, node.raw = [Node(node.value, node.origin, node.where, node.raw)], None
        case Table(section) if isinstance(node.value, dict):
            for name, below in shapes(section).items():
                if name in node.value:
                    expand_short_forms(node.value[name], below)
        case _:
            pass


def _drop_replaced(root: Node, section: type[Section]) -> list[str]:
    """Drops options of the file that belong to a kind of section which a flag has replaced."""
    notes: list[str] = []
    for name, shape in shapes(section).items():
        node = root.value.get(name)
        if not isinstance(shape, Choice) or node is None or not isinstance(node.value, dict):
            continue
        chosen = node.value.get(shape.tag)
        if chosen is None or chosen.origin != "flag" or not isinstance(chosen.value, str):
            continue
        if chosen.value not in shape.members:
            continue
        known = shape.members[chosen.value].model_fields
        for key in [key for key, value in node.value.items() if key not in known and value.origin == "file"]:
            where = node.value.pop(key).where
            notes.append(f"Ignoring {name}.{key} ({where}): {name}.{shape.tag}={chosen.value} has no such option.")
    return notes


def drop_ignored(root: Node) -> list[str]:
    """Drops a base format that a GGUF file overrides, and returns a sentence for each option without effect."""
    notes = _drop_format(root)
    for name, cause in _DISABLED_BY:
        given, decisive = root.find(name.split(".")), root.find(cause.split("."))
        if given is not None and decisive is not None and decisive.value is not None:
            notes.append(f"Ignoring {name}{_line(given)}: {cause} is set.")
    objective, train_on = root.find(("objective", "kind")), root.find(("data", "train_on"))
    kind = "sft" if objective is None else objective.value
    if kind != "sft" and train_on is not None and train_on.value == "assistant":
        notes.append(f"Ignoring data.train_on{_line(train_on)}: only supervised fine-tuning (sft) distinguishes turns.")
    return notes


def _drop_format(root: Node) -> list[str]:
    """Drops the file's base format if a flag names a GGUF file as the model.

    If both come from the same place, the format stays: it applies to tensors that the GGUF file stores unquantized, and
    contradictions are reported when the file is read.
    """
    model, format = root.find(("model", "id")), root.find(("base", "format"))
    if model is None or model.origin == "file" or not str(model.value).lower().endswith(".gguf"):
        return []
    if format is None or format.origin == "flag" or format.value in (None, "none"):
        return []
    del root.value["base"]
    return [
        f"Ignoring base.format={format.value}{_line(format)}: the weights of a GGUF file are already quantized. "
        f"(--base.format={format.value} quantizes those that are not.)"
    ]


def _line(node: Node) -> str:
    return f" ({node.where})" if node.origin == "file" else ""
