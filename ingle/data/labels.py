"""Reads rows with labels in a column of any name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ingle.data.layout_detection import detect_layout
from ingle.data.layouts import parse_row
from ingle.data.types import Example, RowParser
from ingle.errors import DataError


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
