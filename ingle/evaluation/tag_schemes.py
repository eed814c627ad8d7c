"""Tag schemes: which words of a tagged sentence form an entity.

A tag is a prefix and a type, such as ``B-PER``; ``O`` is outside. ``auto`` reads any sequence, as conlleval does and
seqeval by default. A scheme reads only what it allows, as seqeval's strict mode.

Source: Ramshaw and Marcus 1995 (IOB1); Tjong Kim Sang and Veenstra 1999, EACL (IOB2, IOE1, IOE2); Ratinov and Roth
2009, CoNLL (BILOU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ingle.errors import EvaluationError


class Entity(NamedTuple):
    """Words ``first`` to ``last`` (inclusive), and their type."""

    kind: str
    first: int
    last: int


class _Scheme(NamedTuple):
    """Allowed prefixes, and pairs of neighbouring tags that start, continue or end an entity.

    A pair is written as two prefixes (``?`` for any) and the relation of their types: ``=`` equal, ``!`` different,
    ``*`` any.
    """

    prefixes: str
    starts: tuple[str, ...]
    continues: tuple[str, ...]
    ends: tuple[str, ...]


_SCHEMES = {
    "iob1": _Scheme(
        "IOB", ("OI*", "II!", "BI*", "IB=", "BB="), ("BI=", "II="), ("II!", "IO*", "IB*", "BO*", "BI!", "BB=")
    ),
    "iob2": _Scheme("IOB", ("?B*",), ("BI=", "II="), ("IO*", "II!", "IB*", "BO*", "BI!", "BB*")),
    "ioe1": _Scheme("IOE", ("OI*", "II!", "EI*", "EE="), ("II=", "IE="), ("II!", "IO*", "IE!", "EI=", "EE=")),
    "ioe2": _Scheme("IOE", ("OI*", "OE*", "EI*", "EE*", "II!", "IE!"), ("IE=", "II="), ("E?*",)),
    "iobes": _Scheme("IOBES", ("?B*", "?S*"), ("BI=", "BE=", "II=", "IE="), ("S?*", "E?*")),
    "bilou": _Scheme("BILOU", ("?B*", "?U*"), ("BI=", "BL=", "II=", "IL="), ("U?*", "L?*")),
}


def find_entities(tags: Sequence[str], scheme: str = "auto") -> list[Entity]:
    """Returns the entities of a sentence, in order.

    Args:
        tags: A tag per word.
        scheme: ``auto``, or the name of a scheme.

    Raises:
        EvaluationError: The scheme has no such tag.
    """
    return _find_lenient(tags) if scheme == "auto" else _find_strict(tags, scheme)


def type_of(tag: str) -> str:
    """Returns the type of a tag; ``_`` for a bare prefix."""
    return tag[1:].strip("-") or "_"


def _find_lenient(tags: Sequence[str]) -> list[Entity]:
    found: list[Entity] = []
    first, before, kind = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, new_kind = tag[0], tag[1:].split("-", 1)[-1] or "_"
        changed = new_kind != kind
        ends = before in "ES" or (before in "BI" and prefix in "BSO") or (before not in "O." and changed)
        starts = prefix in "BS" or (before in "ESO" and prefix in "EI") or (prefix not in "O." and changed)
        if ends:
            found.append(Entity(kind, first, place - 1))
        if starts:
            first = place
        before, kind = prefix, new_kind
    return found


def _find_strict(tags: Sequence[str], name: str) -> list[Entity]:
    scheme = _SCHEMES[name]
    words = [(tag[:1], type_of(tag)) for tag in tags]
    for tag, (prefix, _) in zip(tags, words, strict=True):
        if not prefix or prefix not in scheme.prefixes:
            raise EvaluationError(
                f"The scheme {name} has no tag {tag!r}.",
                where="evaluate.tag_scheme",
                why=f"its tags begin with {', '.join(scheme.prefixes)}",
                fix="use the scheme of the data, or `auto`",
            )
    outside = ("O", "_")
    words.append(outside)
    found: list[Entity] = []
    place, before = 0, outside
    while place < len(words):
        if _fits(scheme.starts, before, words[place]):
            end = place + 1
            while end < len(words) - 1 and _fits(scheme.continues, words[end - 1], words[end]):
                end += 1
            if _fits(scheme.ends, words[end - 1], words[end]):
                found.append(Entity(words[place][1], place, end - 1))
            place = end
        else:
            place += 1
        before = words[place - 1]
    return found


def _fits(patterns: Sequence[str], before: tuple[str, str], word: tuple[str, str]) -> bool:
    relations = "*=" if before[1] == word[1] else "*!"
    return any(pair[0] in ("?", before[0]) and pair[1] in ("?", word[0]) and pair[2] in relations for pair in patterns)
