"""What can be told of a data file without a model: rows, layout, lengths in characters, duplicates."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ingle.config.data import Source
from ingle.data.duplicates import Duplicates, find_duplicates
from ingle.data.layouts import detect_layout
from ingle.data.readers import read_rows
from ingle.data.report import Lengths, draw_lengths, draw_pairs, draw_problems, measure
from ingle.data.sources import find_files, read_examples
from ingle.data.types import Example, last_answer
from ingle.errors import DataError
from ingle.wording import plural

_MAX_SHOWN_CHARS = 1200


@dataclass(frozen=True, slots=True)
class RowPreview:
    """One row: ``file:line``, and what is said in it, each with its role (``text`` for plain text)."""

    origin: str
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RowsReport:
    """What ``ingle data inspect FILE`` tells without a model.

    Attributes:
        path: As typed.
        rows: In the file.
        layouts: How many rows are read in which layout.
        columns: Of the first row.
        characters: Lengths of rows, in characters.
        duplicates: Among the rows.
        previews: A few rows.
        problems: What to look at, in sentences.
    """

    path: str
    rows: int
    layouts: dict[str, int]
    columns: tuple[str, ...]
    characters: Lengths
    duplicates: Duplicates
    previews: tuple[RowPreview, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect_rows(path: str, *, num_previews: int = 3) -> RowsReport:
    """Reads a file, folder or glob as ``data.sources`` would.

    Raises:
        DataError: It is missing, or a row is malformed.
    """
    files = find_files(path)
    if files is None:
        raise DataError("There is no such file.", where=path, fix="check the path")
    layouts: Counter[str] = Counter()
    columns: tuple[str, ...] = ()
    problems = []
    examples: list[Example] = []
    for file in files:
        place, first = next(iter(read_rows(file)))
        layout, others = detect_layout(first, f"{file}:{place}")
        columns = columns or tuple(first)
        if others:
            problems.append(f"{file} could also be read as {', '.join(others)}; set layout: in data.sources")
        read = list(read_examples([Source(path=str(file))]))
        layouts[layout] += len(read)
        examples += read
    duplicates = find_duplicates(examples)
    return RowsReport(
        path=path,
        rows=len(examples),
        layouts=dict(layouts),
        columns=columns,
        characters=measure(np.array([_length(example) for example in examples])),
        duplicates=duplicates,
        previews=tuple(
            RowPreview(examples[int(i)].origin, _parts(examples[int(i)]))
            for i in np.unique(np.linspace(0, len(examples) - 1, min(num_previews, len(examples))).round())
        ),
        problems=(*problems, *_find_problems(examples, duplicates)),
    )


def _parts(example: Example) -> tuple[tuple[str, str], ...]:
    if example.text is not None:
        return (("text", example.text),)
    if example.prompt is not None:
        return (("prompt", example.prompt), ("completion", example.completion or ""))
    return tuple((message.role, message.content) for message in example.messages)


def _length(example: Example) -> int:
    return sum(len(text) for _, text in _parts(example))


def _find_problems(examples: list[Example], duplicates: Duplicates) -> list[str]:
    problems = []
    answers = [(example.origin, last_answer(example)) for example in examples if example.text is None]
    none = [origin for origin, answer in answers if answer is None]
    empty = [origin for origin, answer in answers if answer is not None and not answer.strip()]
    empty += [example.origin for example in examples if example.text is not None and not example.text.strip()]
    if none:
        problems.append(f"{plural(len(none), 'row')} without an assistant turn (first {none[0]})")
    if empty:
        problems.append(f"{plural(len(empty), 'row')} with an empty answer or text (first {empty[0]})")
    if duplicates.exact:
        verb = "is an exact duplicate" if duplicates.exact == 1 else "are exact duplicates"
        problems.append(f"{duplicates.exact:,} of {plural(duplicates.rows, 'row')} {verb}")
    if duplicates.near > 0.05 * duplicates.compared:
        problems.append(f"{duplicates.near:,} of {plural(duplicates.compared, 'distinct row')} nearly repeated")
    return problems


def render_rows(report: RowsReport, console: Console) -> None:
    """Print a report."""
    for preview in report.previews:
        body = Text()
        for role, text in preview.parts:
            body.append(f"{role}\n", style="bold")
            body.append((text[:_MAX_SHOWN_CHARS] + " ..." if len(text) > _MAX_SHOWN_CHARS else text) + "\n")
        console.print(Panel(body, title=Text(preview.origin), title_align="left"))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("file", Text(report.path))
    table.add_row("rows", f"{report.rows:,}")
    table.add_row("layout", ", ".join(f"{name} ({plural(n, 'row')})" for name, n in report.layouts.items()))
    table.add_row("columns", Text(", ".join(report.columns)))
    table.add_row("exact duplicates", plural(report.duplicates.exact, "row"))
    table.add_row(
        "near duplicates", f"{report.duplicates.near:,} of {plural(report.duplicates.compared, 'distinct row')}"
    )
    console.print(draw_lengths("Characters of a row", report.characters, console))
    console.print(table)
    for title, pairs in (("Exact", report.duplicates.exact_pairs), ("Near", report.duplicates.near_pairs)):
        if pairs:
            console.print(draw_pairs(f"{title} duplicates", pairs))
    draw_problems(report.problems, bool(report.duplicates.exact_pairs or report.duplicates.near_pairs), console)
    console.print(
        Text(
            "Without a model there are no tokens to count: --model PATH_OR_ID shows what carries loss, what is cut and "
            "how rows pack."
        )
    )
