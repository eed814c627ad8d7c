"""JSON as a tree that allows duplicate keys and numbers of any length, and mutations of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Text that is written unchanged."""

    text: str


class Object(list[tuple[str, Any]]):
    """A JSON object as pairs, which allows duplicate keys."""


def parse(text: str) -> Any:
    """Parses JSON."""
    return json.loads(text, object_pairs_hook=Object)


def dump(tree: Any) -> str:
    """Writes a tree as JSON."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, Object):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {dump(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(dump, tree)) + "]"
    return json.dumps(tree)


#: Unexpected values: wrong types, absurd sizes, unusual text.
ODD: tuple[Any, ...] = (
    *(None, True, False, [], Object(), "", " ", 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e308, 2**31 - 1, 2**31, 2**32),
    *(2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**12, 10**40, 65, 1000, 4096, 100_000),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e400"), Raw("-0"), Raw("1" + "0" * 4000), Raw("9" * 10_000)),
    *(Raw('"\\ud800"'), Raw('"\\u0000"'), "\ufeff", "\u202e", "e\u0301", "\U0001f926\u200d", "x" * 70_000, "٣"),
    *("../..", "/", "/dev/null", "/dev/zero", "nan", "null", "true", "1", "-1", "0x10", "1e9", "{{ 1/0 }}", "%s"),
    *([None], [[]], [-1], ["a", "a"], [1, "a"], Object([("a", 1)]), Object([("", None)])),
    *(Raw("[" * 900 + "]" * 900), Raw("[" * 50_000 + "]" * 50_000), Raw('{"a":' * 2000 + "1" + "}" * 2000)),
)


def places(tree: Any) -> Iterator[tuple[Any, int]]:
    """Yields the container and index of every value below the root."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, list):
            continue
        for index, item in enumerate(node):
            yield node, index
            waiting.append(item[1] if isinstance(node, Object) else item)


def value_at(container: Any, index: int) -> Any:
    """Returns the value at an index."""
    return container[index][1] if isinstance(container, Object) else container[index]


def put(container: Any, index: int, value: Any) -> None:
    """Sets the value at an index."""
    container[index] = (container[index][0], value) if isinstance(container, Object) else value


def copy(tree: Any) -> Any:
    """Returns a deep copy."""
    if isinstance(tree, Object):
        return Object((key, copy(value)) for key, value in tree)
    return [copy(value) for value in tree] if isinstance(tree, list) else tree


def mutate(tree: Any, rng: Random) -> tuple[Any, str]:
    """Returns a changed copy of a tree and a description of the change.

    Half of the changes affect the two top levels, because a tree can contain a vocabulary of thousands of words.
    """
    tree = copy(tree)
    found = list(places(tree))
    if not found:
        return rng.choice(ODD), "another root"
    shallow = [(tree, index) for index in range(len(tree))]
    below = [value_at(tree, index) for index in range(len(tree))]
    shallow += [(value, index) for value in below if _small(value) for index in range(len(value))]
    container, index = rng.choice(shallow if rng.random() < 0.5 else found)
    name = _name(container, index)
    match rng.randrange(12):
        case 0 | 1 | 2 | 3 | 4:
            odd = rng.choice(ODD)
            put(container, index, odd)
            return tree, f"{name} = {dump(odd)[:40]}"
        case 5:
            del container[index]
            return tree, f"{name} removed"
        case 6:
            again = container[index]
            if isinstance(container, Object):
                again = (again[0], rng.choice(ODD))
            container.insert(rng.randrange(len(container) + 1), again)
            return tree, f"{name} twice"
        case 7:
            other, at = rng.choice(found)
            first, second = value_at(container, index), value_at(other, at)
            put(container, index, copy(second))
            put(other, at, copy(first) if not _holds(first, other) else None)
            return tree, f"{name} swapped with {_name(other, at)}"
        case 8:
            if isinstance(container, Object):
                key, value = container[index]
                new = rng.choice((key.upper(), f" {key}", key[:-1], "", "__class__", rng.choice(container)[0]))
                container[index] = (new, value)
                return tree, f"{name} renamed to {new[:30]!r}"
            rng.shuffle(container)
            return tree, "a list shuffled"
        case 9:
            put(container, index, [copy(value_at(container, index))])
            return tree, f"{name} in a list"
        case 10:
            value = value_at(container, index)
            put(container, index, _near(value, rng))
            return tree, f"{name} = {dump(value_at(container, index))[:40]}"
        case _:
            depth = rng.choice((10, 500, 5000))
            put(container, index, Raw("[" * depth + dump(value_at(container, index)) + "]" * depth))
            return tree, f"{name} in {depth} lists"


def respell(tree: Any, rng: Random) -> str:
    """Writes the same tree with a different order of keys, white space and escapes."""
    plain = _plain(tree, rng)
    spaces = rng.choice(({"indent": 3}, {"separators": (",", ":")}, {"separators": (" ,\t", " : ")}, {}))
    return json.dumps(plain, ensure_ascii=rng.random() < 0.5, **spaces) + rng.choice(("", "\n", " \n\n"))


def _plain(tree: Any, rng: Random) -> Any:
    if isinstance(tree, Object):
        return {key: _plain(value, rng) for key, value in rng.sample(tree, len(tree))}
    return [_plain(value, rng) for value in tree] if isinstance(tree, list) else tree


def _near(value: Any, rng: Random) -> Any:
    """Returns a different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**6, 0))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e6, value / 3, 0.0))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value[::-1], value.upper(), value * 2, f"{value}\u0000"))
    return rng.choice(ODD)


def _small(value: Any) -> bool:
    return isinstance(value, list) and len(value) < 50


def _holds(tree: Any, node: Any) -> bool:
    return tree is node or any(value_at(box, at) is node for box, at in places(tree))


def _name(container: Any, index: int) -> str:
    return str(container[index][0])[:40] if isinstance(container, Object) else f"[{index}]"
