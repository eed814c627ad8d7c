"""Reads prompts from the command line, a file or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ingle.config.model_names import nearest_path
from ingle.errors import DataError

#: A text, or a conversation as pairs of role and content.
Prompt = str | list[tuple[str, str]]

_WAYS = '--prompt "...", --prompt-file FILE, or text on standard input'


def read_prompts(texts: Sequence[str], file: Path | None, *, raw: bool = False) -> list[Prompt]:
    """Returns the prompts of a command.

    Args:
        texts: Values of ``--prompt``.
        file: Value of ``--prompt-file``: JSON lines with a text, ``{"prompt": ...}`` or ``{"messages": [...]}``, or
            text with one prompt per line. Without texts and file, standard input is one prompt.
        raw: Whether the model continues the prompts as they are; white space is then a valid prompt.

    Raises:
        DataError: There is no prompt, or a prompt is empty or cannot be read.
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
        raise DataError("There is no prompt.", where=str(file), fix="write one prompt per line")
    for prompt, where in found:
        parts = [prompt] if isinstance(prompt, str) else [content for _, content in prompt]
        if not (parts[-1] if raw else parts[-1].strip()):
            raise DataError("A prompt is empty.", where=where, fix="write at least one word, or remove it")
        for part in parts:
            check_text(part, where)
    return [prompt for prompt, _ in found]


def check_text(text: str, where: str) -> None:
    """Raises for lone surrogates, which no tokenizer accepts.

    They come from command-line bytes that are not UTF-8, or from escapes in JSON.
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
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would split at U+2028 in JSON strings
    except FileNotFoundError:
        near = nearest_path(file)
        raise DataError(
            "The prompt file does not exist.", where=str(file), fix=f"did you mean {near}?" if near else None
        ) from None
    except IsADirectoryError:
        raise DataError("The prompt file is a folder.", where=str(file), fix="name a file in it") from None
    except UnicodeDecodeError as error:
        raise DataError("The prompt file is not UTF-8 text.", where=str(file), why=str(error)) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}:{number}"
            yield _read_row(line, where) if file.suffix in (".jsonl", ".json") else line, where


def _read_row(line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        fix = "write one JSON value per line"
        raise DataError("This line is not JSON.", where=where, why=str(error), fix=fix) from None
    match row:
        case str():
            return row
        case {"prompt": str(text)}:
            return text
        case {"messages": [*messages]} if messages:
            return _read_messages(messages, where)
    raise DataError(
        "This line contains no prompt.",
        where=where,
        fix='{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
    )


def _read_messages(messages: list[Any], where: str) -> list[tuple[str, str]]:
    """Returns the messages without the final answer, so that rows of a dataset can be used as prompts."""
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
        raise DataError("The conversation has no message to answer.", where=where)
    return read
