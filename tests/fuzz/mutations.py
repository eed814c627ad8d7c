"""What is done to a file: its bytes, its text, or what its format is made of.

Every function takes the content and a ``Random`` and returns another content with a sentence about it.
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

#: Numbers at which lengths, counts and offsets go wrong.
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
    """One to eight bits, half of the time in the first kilobyte, where headers are."""
    if not content:
        return b"\x01", "a byte in an empty file"
    changed = bytearray(content)
    end = len(content) if rng.random() < 0.5 else min(len(content), 1024)
    at = [rng.randrange(end) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for place in at:
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed), f"bits flipped at {at}"


def truncate(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Cut short, mostly somewhere, at times of everything or of one byte."""
    size = len(content)
    length = rng.choice((0, max(0, size - 1), rng.randrange(size + 1), rng.randrange(min(size, 64) + 1)))
    return content[:length], f"cut to {length} of {len(content)} bytes"


def splice(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A piece is copied to another place, over what is there or between it, or taken out."""
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
    """A little-endian number of one to eight bytes becomes an extreme one."""
    width = rng.choice((1, 2, 4, 8))
    if len(content) < width:
        return bytes(8), "eight zeros"
    end = len(content) if rng.random() < 0.3 else min(len(content), 4096)
    at = rng.randrange(max(1, end - width + 1))
    number = rng.choice(_EXTREMES) % 2 ** (8 * width)
    return content[:at] + number.to_bytes(width, "little") + content[at + width :], f"{number} in {width} bytes at {at}"


def insert_text(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Odd text somewhere."""
    piece, at = rng.choice(snippets.TEXTS), rng.randrange(len(content) + 1)
    return content[:at] + piece + content[at:], f"{piece[:12]!r} at {at}"


def encode_otherwise(content: bytes, rng: Random) -> tuple[bytes, str]:
    """The whole text in another encoding, with other line ends, or compressed."""
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
    """The same JSON document as another text."""
    try:
        return trees.respell(trees.parse(content.decode()), rng).encode("utf-8", "surrogatepass"), "spelled otherwise"
    except (ValueError, RecursionError):
        return insert_text(content, rng)


def jsonl_respelled(content: bytes, rng: Random) -> tuple[bytes, str]:
    """The same rows as other lines."""
    lines = [line for line in content.split(b"\n") if line.strip()]
    try:
        rows = [json.dumps(json.loads(line), ensure_ascii=rng.random() < 0.5) for line in lines]
    except (ValueError, RecursionError):
        return insert_text(content, rng)
    return rng.choice(("\n", "\r\n", "\n\n")).join(rows).encode("utf-8", "surrogatepass"), "spelled otherwise"


def yaml_respelled(content: bytes, rng: Random) -> tuple[bytes, str]:
    """The same YAML document as another text."""
    try:
        tree = yaml.safe_load(content)
        flow = rng.choice((None, True, False))
        text = yaml.safe_dump(tree, default_flow_style=flow, width=rng.choice((20, 80, 10**6)), sort_keys=True)
    except (yaml.YAMLError, ValueError, RecursionError, UnicodeDecodeError, TypeError):
        return insert_text(content, rng)
    return f"# a comment: {{\n{text}\n# the end".encode(), "spelled otherwise"


def json_tree(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A change in a JSON document."""
    try:
        tree = trees.parse(content.decode())
    except (ValueError, RecursionError):
        return flip_bits(content, rng)
    changed, done = trees.mutate(tree, rng)
    return trees.dump(changed).encode("utf-8", "surrogatepass"), done


def json_lines(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A change in one row of JSON lines, or of the order of rows."""
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
    """A change in the header, whose length then fits again; or in what lies between header and data."""
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
    """A line that readers have died of, between others or in place of one; or a change in the tree, written as JSON."""
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
    """A change in a list of words of a command line."""
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
    """The first of a tree's text."""
    return trees.dump(tree)[:80]


def jinja(content: bytes, rng: Random) -> tuple[bytes, str]:
    """A snippet somewhere in a template, or in place of it."""
    piece, text = rng.choice(snippets.JINJA), content.decode("utf-8", "replace")
    ends = [0, len(text), *(at + 2 for at in range(len(text)) if text[at : at + 2] in ("%}", "}}"))]
    at = rng.choice(ends)
    changed = piece if rng.random() < 0.2 else text[:at] + piece + text[at:]
    return changed.encode("utf-8", "surrogatepass"), f"{piece[:50]!r} at {at}"


_BYTES: tuple[Mutation, ...] = (flip_bits, truncate, splice, set_number)
_TEXT: tuple[Mutation, ...] = (flip_bits, truncate, splice, insert_text, encode_otherwise)

#: The changes for each kind of file; the ones that know the format come up most often.
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
    """One to three changes to a file of a kind."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        try:
            content, what = rng.choice(KINDS[kind])(content, rng)
        except RecursionError:  # an earlier change has nested it too deeply for us
            content, what = flip_bits(content, rng)
        done.append(what)
    return content, "; ".join(done)
