"""Rows of ``classify``, ``tag``, ``answer`` and ``seq2seq``: which columns they use, and how they are read.

The first row of a table decides which columns are meant; renamed to the names below, all rows are read alike:

- ``labelled``: ``text``, ``text_pair`` (optional) and ``label``
- ``tagged``: ``tokens`` and ``tags``
- ``squad``: ``question``, ``context`` and ``answers``
- ``source-target``: ``source``, ``target`` and ``references`` (optional: further targets)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ingle.config.data import Layout
from ingle.config.objective import ObjectiveKind
from ingle.data.types import Example, Span

#: Names of columns, in order of preference.
TEXTS = ("text", "sentence", "review", "content", "document", "tweet", "comment", "title", "question")
_TEXT_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
    ("doc", "summary"),
    ("document", "summary"),
    ("text_a", "text_b"),
    ("text1", "text2"),
)
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "score", "rating", "stars", "intent")
_TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "ner", "label")
#: Columns of multimodal rows, and what they contain.
MEDIA = {
    **dict.fromkeys(("image", "images"), "an image"),
    **dict.fromkeys(("audio", "audios"), "audio"),
    **dict.fromkeys(("video", "videos"), "video"),
}
_ANSWERS = ("answers", "answer", "answer_text")
_SOURCES = (
    ("source", "target"),
    ("input", "target"),
    ("article", "highlights"),
    ("article", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("doc", "summary"),
    ("text", "summary"),
    ("src", "tgt"),
    ("mr", "ref"),
)


def detect_labelled(
    row: Mapping[str, Any], objective: ObjectiveKind, *, has_label: bool = False
) -> tuple[Layout, dict[str, str]] | None:
    """Returns the layout of a row for an objective, and its columns by the names of the layout.

    Args:
        row: The first row of a table.
        objective: ``classify``, ``tag``, ``answer``, ``seq2seq``; all others have no such rows.
        has_label: Whether the label is known without a column.

    Returns:
        None if the row does not fit. A column with labels may be missing.
    """
    row = {name: value for name, value in row.items() if value is not None}
    match objective:
        case "classify":
            roles = _find_texts(row, has_label=has_label)
            return ("labelled", roles) if roles else None
        case "tag":
            tokens = next((name for name in _TOKENS if isinstance(row.get(name), list | str)), None)
            tags = next((name for name in TAGS if isinstance(row.get(name), list | str)), None)
            return ("tagged", _named(tokens=tokens, tags=tags)) if tokens else None
        case "answer":
            answers = next((name for name in _ANSWERS if name in row), None)
            given = all(isinstance(row.get(name), str) for name in ("question", "context"))
            return ("squad", _named(question="question", context="context", answers=answers)) if given else None
        case "seq2seq":
            languages = row.get("translation")
            if isinstance(languages, Mapping) and len(languages) == 2:
                source, target = (f"translation.{name}" for name in languages)
                return "source-target", _named(source=source, target=target)
            pair = _find_pair(row, _SOURCES)
            return ("source-target", _named(source=pair[0], target=pair[1])) if pair else None
    return None


def _find_texts(row: Mapping[str, Any], *, has_label: bool) -> dict[str, str]:
    label = None if has_label else next((name for name in LABELS if name in row), None)
    rest = {name: value for name, value in row.items() if name != label and isinstance(value, str)}
    pair = _find_pair(rest, _TEXT_PAIRS)
    if pair:
        return _named(text=pair[0], text_pair=pair[1], label=label)
    text = find_text(rest)
    return _named(text=text, label=label) if text else {}


def find_text(row: Mapping[str, Any]) -> str | None:
    """Returns the column with a text: one of the usual names, or the only column with text; None if there is none."""
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in MEDIA]
    return next((name for name in TEXTS if name in texts), texts[0] if len(texts) == 1 else None)


def _find_pair(row: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    return next((pair for pair in pairs if all(isinstance(row.get(name), str) for name in pair)), None)


def _named(**columns: str | None) -> dict[str, str]:
    return {name: own for name, own in columns.items() if own is not None}


def parse_labelled(row: Mapping[str, Any], layout: Layout, origin: str) -> Example:
    """Reads a row whose columns have the names of its layout.

    Raises:
        ValueError: It does not fit the layout.
    """
    match layout:
        case "labelled":
            label = _read_label(row.get("label"))
            if row.get("text_pair") is None:
                return Example(origin, text=_text(row, "text"), label=label)
            texts = {name: Example(origin, text=_text(row, name)) for name in ("text", "text_pair")}
            return Example(origin, texts=texts, label=label)
        case "tagged" | "conll":
            return _read_tagged(row, origin)
        case "squad":
            return _read_question(row, origin)
        case "source-target":
            return _read_target(row, origin)
    raise AssertionError(layout)


def _read_target(row: Mapping[str, Any], origin: str) -> Example:
    """Reads a source and its target; without a target, the first of its references."""
    references = row.get("references") or []
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        raise ValueError("'references' must be a list of strings")
    target = _text(row, "target") if row.get("target") is not None else next(iter(references), "")
    others = tuple(dict.fromkeys(item for item in references if item != target))
    return Example(origin, prompt=_text(row, "source"), completion=target, references=others)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    raise ValueError(f"{name!r} is {type(value).__name__}, not text" if value is not None else f"{name!r} is missing")


def _read_label(value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, list | tuple):
        return tuple(_read_one(item) for item in value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _read_one(value)


def _read_one(value: Any) -> str:
    """Returns a class as text: ``true`` for True, ``3`` for 3 and 3.0."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise ValueError(f"the label {value!r} is neither a name nor a number")


def _words(row: Mapping[str, Any], name: str) -> list[str]:
    value = row.get(name)
    items = value.split() if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
        raise ValueError(f"{name!r} must be a list of words")
    return [str(item) for item in items]


def _read_tagged(row: Mapping[str, Any], origin: str) -> Example:
    words = _words(row, "tokens")
    tags = _words(row, "tags") if row.get("tags") is not None else None
    if tags is not None and len(tags) != len(words):
        raise ValueError(f"{len(words)} tokens have {len(tags)} tags")
    ends, position = [], 0
    for word in words:
        ends.append((position, position + len(word)))
        position += len(word) + 1
    return Example(origin, text=" ".join(words), words=tuple(ends), label=None if tags is None else tuple(tags))


def _read_question(row: Mapping[str, Any], origin: str) -> Example:
    context = _text(row, "context")
    texts = {name: Example(origin, text=_text(row, name)) for name in ("question", "context")}
    found = _read_answers(row)
    if found is None:
        return Example(origin, texts=texts)
    spans = tuple(_locate(text, start, context) for text, start in found)
    return Example(origin, texts=texts, label=spans, references=tuple(dict.fromkeys(text for text, _ in found)))


def _read_answers(row: Mapping[str, Any]) -> list[tuple[str, int]] | None:
    """Returns texts and places of the accepted answers; none if the context has no answer, None if it is unknown."""
    if row.get("is_impossible"):
        return []
    answers = row.get("answers")
    if answers is None:
        return None
    if isinstance(answers, str):
        answers = {"text": [answers], "answer_start": [row.get("answer_start")]}
    if isinstance(answers, Mapping):
        texts, starts = (answers.get(name) for name in ("text", "answer_start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError("'answers' must have lists 'text' and 'answer_start' of the same length")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    found = []
    for answer in answers if isinstance(answers, list) else [answers]:
        start = answer.get("answer_start") if isinstance(answer, Mapping) else None
        if isinstance(start, str) and start.isdecimal():  # a column of a CSV file
            start = int(start)
        if not isinstance(answer, Mapping) or not isinstance(answer.get("text"), str) or not isinstance(start, int):
            raise ValueError("an answer must have 'text' and a number 'answer_start'")
        found.append((answer["text"], start))
    return found


def _locate(text: str, start: int, context: str) -> Span:
    if start >= 0 and context[start : start + len(text)] == text and text:
        return Span(start, start + len(text))
    places = [match.start() for match in re.finditer(re.escape(text), context)] if text else []
    near = f"; it is at {min(places, key=lambda place: abs(place - start))}" if places else ""
    raise ValueError(f"the answer {text[:60]!r} is not at character {start} of the context{near}")
