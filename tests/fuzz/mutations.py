"""Mutations of files: of bytes, of text, and of the structure of a format.

Every function takes the content and a ``Random``, and returns the changed content and a description of the change.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from random import Random

import yaml

from tests.fuzz import snippets, trees
from tests.fuzz.ggufs import mutate_gguf

Mutation = Callable[[bytes, Random], tuple[bytes, str]]

#: Values that break lengths, counts and offsets.
_EXTREMES = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**48,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def flip_bits(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Flips one to eight bits, half of the time in the first kilobyte, which contains headers."""
    if not content:
        return b"\x01", "a byte in an empty file"
    changed = bytearray(content)
    end = len(content) if rng.random() < 0.5 else min(len(content), 1024)
    at = [rng.randrange(end) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for place in at:
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed), f"bits flipped at {at}"


def truncate(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Truncates the content at a random position, to nothing, or by one byte."""
    size = len(content)
    length = rng.choice((0, max(0, size - 1), rng.randrange(size + 1), rng.randrange(min(size, 64) + 1)))
    return content[:length], f"cut to {length} of {len(content)} bytes"


def splice(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Copies a piece to another position, or removes it."""
    if len(content) < 2:
        return content * 2, "doubled"
    first = rng.randrange(len(content))
    size = min(len(content) - first, rng.choice((1, 4, 8, 64, 1024, len(content))))
    piece, to = content[first : first + size], rng.randrange(len(content))
    match rng.randrange(4):
        case 0:
            return content[:to] + piece + content[to:], f"{size} bytes from {first} inserted at {to}"
        case 1:
            return content[:to] + piece + content[to + size :], f"{size} bytes from {first} copied over {to}"
        case 2:
            return content[:first] + content[first + size :], f"{size} bytes from {first} taken out"
        case _:
            return content + piece, f"{size} bytes from {first} appended"


def set_number(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Replaces a little-endian integer of one to eight bytes by an extreme value."""
    width = rng.choice((1, 2, 4, 8))
    if len(content) < width:
        return bytes(8), "eight zeros"
    end = len(content) if rng.random() < 0.3 else min(len(content), 4096)
    at = rng.randrange(max(1, end - width + 1))
    number = rng.choice(_EXTREMES) % 2 ** (8 * width)
    return content[:at] + number.to_bytes(width, "little") + content[at + width :], f"{number} in {width} bytes at {at}"


def insert_text(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Inserts unusual text at a random position."""
    piece, at = rng.choice(snippets.TEXTS), rng.randrange(len(content) + 1)
    return content[:at] + piece + content[at:], f"{piece[:12]!r} at {at}"


def change_encoding(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes the encoding or the line ends of the text, or compresses it."""
    text = content.decode("utf-8", "replace")
    name = rng.choice(("utf-16", "utf-16-le", "utf-8-sig", "cp1252", "crlf", "cr", "gzip", "empty", "spaces"))
    match name:
        case "crlf":
            return content.replace(b"\n", b"\r\n"), name
        case "cr":
            return content.replace(b"\n", b"\r"), name
        case "gzip":
            return gzip.compress(content, mtime=0), name
        case "empty":
            return b"", name
        case "spaces":
            return b" " * 100 + b"\n" * 100, name
    return text.encode(name, "replace"), f"in {name}"


def json_respelled(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Formats the same JSON document differently."""
    try:
        return trees.respell(trees.parse(content.decode()), rng).encode("utf-8", "surrogatepass"), "spelled otherwise"
    except (ValueError, RecursionError):
        return insert_text(content, rng)


def jsonl_respelled(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Formats the same rows differently."""
    lines = [line for line in content.split(b"\n") if line.strip()]
    try:
        rows = [json.dumps(json.loads(line), ensure_ascii=rng.random() < 0.5) for line in lines]
    except (ValueError, RecursionError):
        return insert_text(content, rng)
    return rng.choice(("\n", "\r\n", "\n\n")).join(rows).encode("utf-8", "surrogatepass"), "spelled otherwise"


def yaml_respelled(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Formats the same YAML document differently."""
    try:
        tree = yaml.safe_load(content)
        flow = rng.choice((None, True, False))
        text = yaml.safe_dump(tree, default_flow_style=flow, width=rng.choice((20, 80, 10**6)), sort_keys=True)
    except (yaml.YAMLError, ValueError, RecursionError, UnicodeDecodeError, TypeError):
        return insert_text(content, rng)
    return f"# a comment: {{\n{text}\n# the end".encode(), "spelled otherwise"


def json_tree(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes a JSON document."""
    try:
        tree = trees.parse(content.decode())
    except (ValueError, RecursionError):
        return flip_bits(content, rng)
    changed, done = trees.mutate(tree, rng)
    return trees.dump(changed).encode("utf-8", "surrogatepass"), done


def json_lines(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes a row of JSON lines or the order of rows."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
            return b"\n".join(lines), f"line {at + 1} twice"
        case 1:
            rng.shuffle(lines)
            return b"\n".join(lines), "lines shuffled"
    lines[at], done = json_tree(lines[at], rng)
    return b"\n".join(lines), f"line {at + 1}: {done}"


def safetensors_header(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes the header, with a correct length, or the data after the last tensor."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        tree = trees.parse(content[8 : 8 + length].decode())
    except (ValueError, RecursionError, struct.error):
        return flip_bits(content, rng)
    data = content[8 + length :]
    names = [key for key, _ in tree if key != "__metadata__"]
    kind = rng.randrange(6)
    if kind == 0 and len(names) > 1:
        one, other = rng.sample(names, 2)
        entries = dict(tree)
        offsets = dict(entries[other])["data_offsets"]
        tree = trees.Object(
            (key, trees.Object((k, offsets if k == "data_offsets" else v) for k, v in value) if key == one else value)
            for key, value in tree
        )
        done = f"{one} at the place of {other}"
    elif kind == 1:
        shift = rng.choice((-8, -1, 1, 4, 8, 2**40))
        one = rng.choice(names)
        tree = trees.Object((key, _shifted(value, shift) if key == one else value) for key, value in tree)
        done = f"{one} moved by {shift}"
    elif kind == 2:
        data, done = data + bytes(rng.choice((1, 8, 4096))), "bytes after the last tensor"
    elif kind == 3:
        tree, done = trees.Object(rng.sample(tree, len(tree))), "in another order"
    else:
        tree, done = trees.mutate(tree, rng)
    header = trees.dump(tree).encode("utf-8", "surrogatepass")
    if rng.random() < 0.5:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data, f"header: {done}"


def _shifted(entry: trees.Object, shift: int) -> trees.Object:
    return trees.Object((k, [at + shift for at in v] if k == "data_offsets" else v) for k, v in entry)


def yaml_lines(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Inserts or replaces a line, or changes the tree and writes it as JSON."""
    lines = content.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(at, rng.choice(snippets.YAML))
            return "\n".join(lines).encode(), f"{lines[at][:40]!r} before line {at + 1}"
        case 1:
            line = lines[at]
            lines[at] = rng.choice((line * 2, f" {line}", line.replace(":", ""), rng.choice(lines), "", "- a"))
            return "\n".join(lines).encode(), f"line {at + 1} is {lines[at][:40]!r}"
    try:
        tree = trees.parse(json.dumps(yaml.safe_load(content), default=str))
    except (yaml.YAMLError, ValueError, RecursionError, UnicodeDecodeError, TypeError):
        return insert_text(content, rng)
    changed, done = trees.mutate(tree, rng)
    return trees.dump(changed).encode("utf-8", "surrogatepass"), done


def words(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Changes a list of command-line words."""
    try:
        tree = trees.parse(content.decode())
        assert isinstance(tree, list)
    except (ValueError, AssertionError, RecursionError):
        return b"[]", "no words"
    if rng.random() < 0.7:
        tree.insert(rng.randrange(len(tree) + 1), rng.choice(snippets.WORDS))
        return trees.dump(tree).encode(), f"{dump_short(tree)}"
    tree, done = trees.mutate(tree, rng)
    return trees.dump(tree).encode("utf-8", "surrogatepass"), done


def dump_short(tree: object) -> str:
    """Returns the start of a tree's text."""
    return trees.dump(tree)[:80]


def jinja(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Inserts a snippet into a template, or replaces the template."""
    piece, text = rng.choice(snippets.JINJA), content.decode("utf-8", "replace")
    ends = [0, len(text), *(at + 2 for at in range(len(text)) if text[at : at + 2] in ("%}", "}}"))]
    at = rng.choice(ends)
    changed = piece if rng.random() < 0.2 else text[:at] + piece + text[at:]
    return changed.encode("utf-8", "surrogatepass"), f"{piece[:50]!r} at {at}"


_BYTES: tuple[Mutation, ...] = (flip_bits, truncate, splice, set_number)
_TEXT: tuple[Mutation, ...] = (flip_bits, truncate, splice, insert_text, change_encoding)

#: The mutations of each kind of file; those of its format are the most frequent.
KINDS: dict[str, tuple[Mutation, ...]] = {
    "bytes": _BYTES,
    "text": _TEXT,
    "json": (*_TEXT, *(json_tree,) * 20, *(json_respelled,) * 3),
    "jsonl": (*_TEXT, *(json_lines,) * 10, *(jsonl_respelled,) * 3),
    "safetensors": (*_BYTES, *(safetensors_header,) * 6),
    "yaml": (*_TEXT, *(yaml_lines,) * 12, *(yaml_respelled,) * 3),
    "words": (words,),
    "jinja": (*_TEXT, *(jinja,) * 8),
    "gguf": (*_BYTES, *(mutate_gguf,) * 10),
}


def mutate(content: bytes, kind: str, rng: Random) -> tuple[bytes, str]:
    """Applies one to three mutations to a file."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        try:
            content, what = rng.choice(KINDS[kind])(content, rng)
        except RecursionError:  # an earlier mutation has nested it too deeply
            content, what = flip_bits(content, rng)
        done.append(what)
    return content, "; ".join(done)
