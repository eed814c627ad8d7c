"""The command ``ingle formats``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingle.report.format_advice import LIMIT, NUM_TOKENS

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ingle.report.format_results import FormatReport

#: Columns of the table: cell, title, and rank; a narrow terminal leaves out the highest ranks.
_COLUMNS = (
    ("size", "size", 0),
    ("bits", "bits", 3),
    ("kl", "divergence", 0),
    ("kl_99", "99 % below", 4),
    ("top_1", "same top", 1),
    ("perplexity", "perplexity", 2),
    ("loss", "loss", 5),
    ("rate", "weights/s", 6),
    ("memory", "memory", 7),
)
_VERDICTS = {"yes": "Holds here", "no": "Does not hold here", "in part": "Holds in part"}


def formats(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An unquantized model (16 or 32 bits): a folder or a hub id.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Text to compare on, ideally like the text that the model will process: .jsonl, .txt, ... as for "
            "training.",
        ),
    ],
    formats: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", show_default=False, help="Compare only these formats; all by default."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for formats.json and formats.html, a page with table and charts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score, from the start of FILE.")] = NUM_TOKENS,
    limit: Annotated[
        float, typer.Option(min=0.0, help="Largest divergence of the recommended format, in nats per token.")
    ] = LIMIT,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Quantize with this importance matrix (imatrix.gguf or .dat).")
    ] = None,
) -> None:
    """Compare formats on a model and a text: size, perplexity, divergence, speed and memory.

    Each format is applied to the weights in memory, and its predictions on the text are compared with those of the
    unquantized model. The result ends with a recommendation: the smallest format within the limit. With `--out`, run an
    interrupted command again to continue it.
    """
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console, show

    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.config import ModelConfig
        from ingle.evaluation.format_survey import SurveyRequest, survey

        request = SurveyRequest(
            model=ModelConfig(id=model),
            data=data,
            names=tuple(name.strip() for name in (formats or "").split(",") if name.strip()),
            num_tokens=tokens,
            limit=limit,
            imatrix=imatrix,
            out=out,
        )
        report = survey(request, terminal)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        return
    console = make_console()
    show(console, *_render(report, out, console))


def _render(report: FormatReport, out: Path | None, console: Console) -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    shown = [key for key, _, _ in _COLUMNS]
    unlimited = console.options.update(width=1000)
    while console.measure(table := _table(report, shown), options=unlimited).maximum > console.width and len(shown) > 2:
        shown.remove(max((rank, key) for key, _, rank in _COLUMNS if key in shown)[1])
    left_out = [title for key, title, _ in _COLUMNS if key not in shown]
    choice = report.recommendation
    lines = [
        f"{report.measured_on}. Loss and divergence are in nats per token, against the unquantized model.",
        "● = no other format is smaller without diverging more.",
    ]
    if left_out:
        lines.append(f"Not shown in this narrow terminal: {', '.join(left_out)}. --json and --out show everything.")
    checked = [each for each in report.sayings if each.verdict in _VERDICTS]
    lines += [f"{_VERDICTS[each.verdict]}: {each.claim} ({each.measured})" for each in checked]
    if choice.name is not None:
        lines.append(f"{'Recommended' if choice.within else 'Closest'}: {choice.name}, {choice.reason}")
        lines.append(f"To write it: ingle quantize {shlex.quote(report.subject.model)} --to {choice.name} --out PATH")
    if out is not None:
        lines.append(f"Charts and intervals: {out / 'formats.html'}")
    return [table, *(Padding(Text(line), (0, 0, 0, 2)) for line in lines)]


def _table(report: FormatReport, keys: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ingle.report.format_results import row_cells

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("format", no_wrap=True)
    columns = [(key, title) for key, title, _ in _COLUMNS if key in keys]
    for _, title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for row in (*report.formats, report.reference):
        cells = row_cells(row)
        mark = "●" if row.name in report.front else " "
        style = "bold green" if row.name == report.recommendation.name else ""
        table.add_row(Text(f"{mark} {row.name}", style=style), *(cells[key] for key, _ in columns))
    return table
