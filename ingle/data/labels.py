"""Reads rows with several texts or with labels, for objectives such as preferences and classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ingle.data.layout_detection import detect_layout
from ingle.data.layouts import PAIRS, parse_row
from ingle.data.messages import is_conversation
from ingle.data.types import Example, RowParser
from ingle.errors import DataError

_FIX_COLUMNS = "rename columns with data.sources: columns: {prompt: ..., chosen: ..., rejected: ...}"


def parse_preference(row: Mapping[str, Any], origin: str) -> Example:
    """Reads a better and a worse answer to one prompt as the texts ``chosen`` and ``rejected``.

    ``chosen`` and ``rejected`` are answers to a prompt, or conversations that contain it.

    Raises:
        DataError: A column is missing or malformed.
    """
    names = ("chosen", "rejected")
    if missing := [name for name in names if row.get(name) is None]:
        raise DataError(f"There is no column {missing[0]!r}.", where=origin, fix=_FIX_COLUMNS)
    prompt = next((name for name, _ in PAIRS if row.get(name) is not None), None)
    return Example(origin, texts={name: _parse_answer(row, prompt, name, origin) for name in names})


def _parse_answer(row: Mapping[str, Any], prompt: str | None, name: str, origin: str) -> Example:
    shared = {key: row[key] for key in ("system", "tools") if key in row}
    answer = row[name]
    if prompt is not None:
        if is_conversation(row[prompt]) and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        return parse_row({"prompt": row[prompt], "completion": answer, **shared}, "prompt-completion", origin)
    if not is_conversation(answer):
        raise DataError("There is no column with the prompt.", where=origin, fix=_FIX_COLUMNS)
    return parse_row({"messages": answer, **shared}, "messages", origin)


def parse_labelled(column: str = "label", classes: Sequence[str] = ()) -> RowParser:
    """Returns a parser of rows with a number or a class in one column.

    The other columns are read in their layout; the label becomes ``document_labels``.

    Args:
        column: The column with the label.
        classes: Names of the classes; a label that is text must be one of them and becomes its index.

    Raises:
        DataError: By the returned parser, if the label is neither a number nor one of ``classes``.
    """

    def parse(row: Mapping[str, Any], origin: str) -> Example:
        text = {name: value for name, value in row.items() if name != column}
        label = row.get(column)
        if isinstance(label, str) and label in classes:
            label = classes.index(label)
        if isinstance(label, bool) or not isinstance(label, int | float):
            expected = f"one of {', '.join(classes)}" if classes else "a number"
            raise DataError("The label is malformed.", where=origin, why=f"{column!r} is {label!r}, not {expected}")
        return replace(parse_row(text, detect_layout(text, origin)[0], origin), labels={"document_labels": label})

    return parse
