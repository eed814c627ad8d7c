"""Prompts from the command line, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ingle.config.model_names import nearest_path
from ingle.errors import DataError

#: A conversation as pairs of role and content, or a text.
Prompt = str | list[tuple[str, str]]

_WAYS = '--prompt "...", --prompt-file FILE, or text on standard input'


def read_prompts(texts: Sequence[str], file: Path | None, *, raw: bool = False) -> list[Prompt]:
    """The prompts of a command.

    Args:
        texts: From ``--prompt``.
        file: From ``--prompt-file``: ``.jsonl`` with a text, ``{"prompt": ...}`` or ``{"messages": [...]}`` a line;
            anything else is text with a prompt a line.  Without texts and file, all of standard input is one prompt.
        raw: Whether prompts are continued as they stand; white space alone is then a prompt as well.

    Raises:
        DataError: There is no prompt, or one is empty or cannot be read.
    """
    found: list[tuple[Prompt, str]] = []
    for number, text in enumerate(texts, 1):
        found.append((text, f"--prompt {number} of {len(texts)}" if len(texts) > 1 else "--prompt"))
    if file is not None:
        found.extend(_read_file(file))
    if not texts and file is None:
        if sys.stdin.isatty():
            raise DataError("There is no prompt.", fix=_WAYS)
        found = [(_read_standard_input(), "standard input")]
    if not found:
        raise DataError("There is no prompt.", where=str(file), fix="write a prompt a line into it")
    for prompt, where in found:
        parts = [prompt] if isinstance(prompt, str) else [content for _, content in prompt]
        if not (parts[-1] if raw else parts[-1].strip()):
            raise DataError("A prompt is empty.", where=where, fix="write at least one word, or leave it out")
        for part in parts:
            check_text(part, where)
    return [prompt for prompt, _ in found]


def check_text(text: str, where: str) -> None:
    """Refuses halves of surrogate pairs: no tokenizer takes them.

    Python makes them of bytes on the command line that are not UTF-8; JSON can spell them.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("This text is not valid Unicode.", where=where, why=str(error)) from None


def _read_standard_input() -> str:
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError("The text is not UTF-8.", where="standard input", why=str(error)) from None
    if not text:
        raise DataError("There is no prompt.", where="standard input", fix=_WAYS)
    return text


def _read_file(file: Path) -> Iterator[tuple[Prompt, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not at the line separators that JSON allows in texts
    except FileNotFoundError:
        near = nearest_path(file)
        raise DataError(
            "The file of prompts does not exist.", where=str(file), fix=f"did you mean {near}?" if near else None
        ) from None
    except IsADirectoryError:
        raise DataError("The file of prompts is a folder.", where=str(file), fix="name a file in it") from None
    except UnicodeDecodeError as error:
        raise DataError("The file of prompts is not UTF-8 text.", where=str(file), why=str(error)) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}:{number}"
            yield _read_row(line, where) if file.suffix in (".jsonl", ".json") else line, where


def _read_row(line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "This line is not JSON.", where=where, why=str(error), fix="write one JSON value a line"
        ) from None
    match row:
        case str():
            return row
        case {"prompt": str(text)}:
            return text
        case {"messages": [*messages]} if messages:
            return _read_messages(messages, where)
    raise DataError(
        "This line holds no prompt.",
        where=where,
        fix='{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
    )


def _read_messages(messages: list[Any], where: str) -> list[tuple[str, str]]:
    """The messages up to the last one that is not the assistant's, so that rows of a data set can be asked again."""
    read: list[tuple[str, str]] = []
    for message in messages:
        match message:
            case {"role": str(role), "content": str(content)}:
                read.append((role, content))
            case _:
                raise DataError("A message needs a role and a content.", where=where)
    while read and read[-1][0] == "assistant":
        read.pop()
    if not read:
        raise DataError("There is no message to answer.", where=where)
    return read
