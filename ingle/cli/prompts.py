"""Prompts from the command line, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ingle.errors import DataError

#: A conversation as pairs of role and content, or a text.
Prompt = str | list[tuple[str, str]]


def read_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """The prompts of a command.

    Args:
        texts: From ``--prompt``.
        file: From ``--prompt-file``: ``.jsonl`` with a text, ``{"prompt": ...}`` or ``{"messages": [...]}`` a line;
            anything else is text with a prompt a line.  Without texts and file, all of standard input is one prompt.

    Raises:
        DataError: There is no prompt, or a line is none.
    """
    prompts: list[Prompt] = list(texts)
    if file is not None:
        prompts.extend(_read_file(file))
    elif not prompts:
        if sys.stdin.isatty():
            raise DataError("There is no prompt.", fix='--prompt "...", --prompt-file FILE, or text on standard input')
        prompts = [sys.stdin.read().removesuffix("\n")]
    if not any(prompts):
        where = "--prompt" if texts else str(file or "standard input")
        raise DataError("There is no prompt.", where=where, fix='--prompt "..."')
    return prompts


def _read_file(file: Path) -> Iterator[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError("The file of prompts does not exist.", where=str(file)) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise DataError("The file of prompts is not UTF-8 text.", where=str(file), why=str(error)) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _read_row(line, f"{file}:{number}") if file.suffix in (".jsonl", ".json") else line


def _read_row(line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError("This line is not JSON.", where=where, why=str(error)) from None
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
