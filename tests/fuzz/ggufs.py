"""Parses and writes GGUF files with arbitrary counts, sizes and offsets, independently of Ingle's reader and writer.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Value:
    """A metadata entry; ``count`` overrides the number of items in the file."""

    key: bytes
    kind: int
    value: Any
    item: int = 0
    count: int | None = None


@dataclass
class Entry:
    """A tensor entry; sizes start with the innermost dimension."""

    name: bytes
    sizes: list[int]
    kind: int
    offset: int
    num_sizes: int | None = None


@dataclass
class Gguf:
    """A parsed file; ``num_values`` and ``num_entries`` override the counts in the file."""

    values: list[Value] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    num_values: int | None = None
    num_entries: int | None = None
    alignment: int = 32


def parse(content: bytes) -> Gguf:
    """Parses a file."""
    at = 4

    def take(layout: str) -> Any:
        nonlocal at
        found = struct.unpack_from(f"<{layout}", content, at)
        at += struct.calcsize(f"<{layout}")
        return found[0] if len(found) == 1 else found

    def text() -> bytes:
        nonlocal at
        size = take("Q")
        if size > len(content):
            raise ValueError("too long")
        at += size
        return content[at - size : at]

    def value(kind: int) -> Any:
        return text() if kind == _STRING else take(_SCALARS[kind])

    if content[:4] != b"GGUF":
        raise ValueError("no magic")
    version, num_entries, num_values = take("IQQ")
    file = Gguf(version=version)
    if max(num_entries, num_values) > len(content):
        raise ValueError("too many")
    for _ in range(num_values):
        key, kind = text(), take("I")
        if kind == _ARRAY:
            item, count = take("IQ")
            if count > len(content):
                raise ValueError("too many")
            file.values.append(Value(key, kind, [value(item) for _ in range(count)], item))
        else:
            file.values.append(Value(key, kind, value(kind)))
    for _ in range(num_entries):
        name, num_sizes = text(), take("I")
        if num_sizes > 8:
            raise ValueError("too many")
        sizes = [take("Q") for _ in range(num_sizes)]
        file.entries.append(Entry(name, sizes, *take("IQ")))
    file.data = content[-(-at // file.alignment) * file.alignment :]
    return file


def dump(file: Gguf) -> bytes:
    """Writes a file."""

    def text(raw: bytes) -> bytes:
        return struct.pack("<Q", len(raw)) + raw

    def scalar(kind: int, value: Any) -> bytes:
        return text(value) if kind == _STRING else struct.pack(f"<{_SCALARS[kind]}", value)

    num_entries = len(file.entries) if file.num_entries is None else file.num_entries
    num_values = len(file.values) if file.num_values is None else file.num_values
    parts = [b"GGUF", struct.pack("<IQQ", file.version, num_entries, num_values)]
    for value in file.values:
        parts += [text(value.key), struct.pack("<I", value.kind)]
        if value.kind == _ARRAY:
            count = len(value.value) if value.count is None else value.count
            parts += [struct.pack("<IQ", value.item, count), *(scalar(value.item, item) for item in value.value)]
        else:
            parts.append(scalar(value.kind, value.value))
    for entry in file.entries:
        num_sizes = len(entry.sizes) if entry.num_sizes is None else entry.num_sizes
        parts += [text(entry.name), struct.pack("<I", num_sizes), *(struct.pack("<Q", size) for size in entry.sizes)]
        parts.append(struct.pack("<IQ", entry.kind, entry.offset))
    head = b"".join(parts)
    return head + bytes(-len(head) % file.alignment) + file.data


def mutate_gguf(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes the metadata or the tensor entries; the rest of the file stays consistent."""
    try:
        file = parse(content)
    except (ValueError, KeyError, IndexError, struct.error):
        at = rng.randrange(len(content) + 1)
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :], f"a byte at {at}"
    if rng.random() < 0.1:
        rng.shuffle(file.values)
        done = "metadata in another order"
    elif not file.values or (file.entries and rng.random() < 0.5):
        done = _change_entries(file, rng)
    else:
        done = _change_values(file, rng)
    return dump(file), done


def _change_values(file: Gguf, rng: Random) -> str:
    value = rng.choice(file.values)
    name = value.key.decode("utf-8", "replace")
    match rng.randrange(9):
        case 0:
            file.values.remove(value)
            return f"{name} removed"
        case 1:
            file.values.append(Value(value.key, value.kind, value.value, value.item))
            return f"{name} twice"
        case 2:
            value.key = rng.choice((b"", b"\xff\xfe", value.key.upper(), value.key + b"\x00", b"general.alignment"))
            return f"{name} renamed to {value.key!r}"
        case 3:
            value.kind, value.value, value.item = rng.choice(_ODD_VALUES)
            return f"{name} is {str(value.value)[:40]} of type {value.kind}"
        case 4 if value.kind == _ARRAY:
            value.count = rng.choice((0, len(value.value) - 1, 2**31, 2**60, 2**64 - 1)) % 2**64
            return f"{name} says it has {value.count} items"
        case 5 if value.kind == _ARRAY and value.value:
            keep = rng.randrange(len(value.value))
            value.value = rng.choice((value.value[:keep], value.value * 2, value.value[::-1], [value.value[0]] * 300))
            return f"{name} has {len(value.value)} items"
        case 6 if value.kind == _ARRAY and value.value and value.item in (4, 5, 6):
            at = rng.randrange(len(value.value))
            value.value[at] = float("nan") if value.item == 6 else rng.choice((0, 99, 2**31 - 1))
            return f"{name}[{at}] is {value.value[at]}"
        case 7:
            count = rng.choice((0, len(file.values) + 1, len(file.values) - 1, 2**40, 2**63))
            file.num_values = count
            return f"{count} values are announced"
        case _:
            if value.kind in (4, 5, 10, 11):
                value.value = rng.choice((0, 1, 3, 17, 63, 2**16, 2**31 - 1))
            elif value.kind == 6:
                value.value = rng.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
            elif value.kind == _STRING:
                value.value = rng.choice((b"", b"\xff", b"x" * 5000, b"gpt2", b"llama", b"gemma3", b"{{ 1 / 0 }}"))
            else:
                value.kind, value.value, value.item = rng.choice(_ODD_VALUES)
            return f"{name} is {str(value.value)[:40]}"


_ODD_VALUES = (
    *((4, 0, 0), (4, 2**32 - 1, 0), (5, -1, 0), (10, 2**64 - 1, 0), (11, -(2**63), 0), (6, float("nan"), 0)),
    *((6, -1e30, 0), (7, True, 0), (8, b"", 0), (8, b"\xf0\x9f", 0), (12, 1e308, 0), (9, [], 8), (9, [], 5)),
    *((9, [b"a", b"a"], 8), (9, [1, 2, 3], 5), (9, [True], 7), (9, [float("inf")], 6)),
)


def _change_entries(file: Gguf, rng: Random) -> str:
    if not file.entries:
        file.entries.append(Entry(b"x", [32], 0, 0))
        return "a tensor x"
    entry, other = rng.choice(file.entries), rng.choice(file.entries)
    name = entry.name.decode("utf-8", "replace")
    match rng.randrange(11):
        case 0:
            file.entries.remove(entry)
            return f"{name} removed"
        case 1:
            file.entries.append(Entry(entry.name, list(entry.sizes), entry.kind, entry.offset))
            return f"{name} twice"
        case 2:
            entry.offset = other.offset
            return f"{name} at the offset of {other.name.decode('utf-8', 'replace')}"
        case 3:
            entry.offset = rng.choice((entry.offset + 32, 1, 2**40, 2**63, 2**64 - 32, max(0, entry.offset - 32)))
            return f"{name} at {entry.offset}"
        case 4:
            entry.sizes[rng.randrange(len(entry.sizes))] = rng.choice((0, 1, 31, 2**20, 2**32, 2**63, 2**64 - 1))
            return f"{name} is {entry.sizes}"
        case 5:
            entry.sizes = rng.choice(([], entry.sizes[::-1], [*entry.sizes, 1], [1, *entry.sizes], [1] * 5))
            return f"{name} is {entry.sizes}"
        case 6:
            entry.kind = rng.choice((0, 1, 2, 8, 12, 24, 26, 28, 30, 39, 99, 2**32 - 1))
            return f"{name} is of type {entry.kind}"
        case 7:
            entry.name = rng.choice((b"", b"\xff", other.name, b"blk.99999999999.attn_q.weight", b"blk.0.attn_q.bias"))
            return f"{name} is called {entry.name!r}"
        case 8:
            entry.num_sizes = rng.choice((0, 1, 3, 5, 2**31))
            return f"{name} says it has {entry.num_sizes} sizes"
        case 9:
            count = rng.choice((0, len(file.entries) + 1, len(file.entries) - 1, 2**40, 2**63))
            file.num_entries = count
            return f"{count} tensors are announced"
        case _:
            file.entries = rng.choice(([], file.entries[::-1], file.entries[:1]))
            return f"{len(file.entries)} tensors, another order"
