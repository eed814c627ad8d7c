"""``ingle formats``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

_TOKENS = 16_384
_LIMIT = 0.02


def formats(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a hub id, in 16 or 32 bits.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="The text to compare on, best what the model will be used for: .jsonl, .txt, ... as for training.",
        ),
    ],
    formats: Annotated[
        str | None, typer.Option(metavar="A,B,C", show_default=False, help="Only these formats; all when left out.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write formats.json and formats.html, a page with table and charts, there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to score, from the beginning of FILE.")] = _TOKENS,
    limit: Annotated[
        float, typer.Option(min=0.0, help="What the recommended format may cost: divergence in nats a token.")
    ] = _LIMIT,
    imatrix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Pack with this importance matrix (imatrix.gguf or .dat).")
    ] = None,
) -> None:
    """Compare base formats on a model and a text: size, perplexity, divergence, speed and memory.

    Every format is applied to the weights in memory and reads the text beside the unpacked model. The end is a
    recommendation: the smallest format that no other beats and that stays within the limit. With `--out` the same
    command goes on after an interruption.
    """
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console, show

    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.config import ModelConfig
        from ingle.evaluation.formats import Survey, survey

        asked = Survey(
            model=ModelConfig(id=model),
            data=data,
            names=tuple(name.strip() for name in (formats or "").split(",") if name.strip()),
            num_tokens=tokens,
            limit=limit,
            imatrix=imatrix,
            out=out,
        )
        report = survey(asked, terminal)
    if as_json:
        print(json.dumps(report, indent=2, allow_nan=False))
        return
    show(make_console(), *_render(report, out))


def _render(report: Mapping[str, Any], out: Path | None) -> list[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ingle.evaluation.formats.wording import row_cells

    columns = ("bits", "size", "perplexity", "loss", "kl", "kl_99", "top_1", "rate", "memory")
    heads = ("bits", "size", "perplexity", "loss", "divergence", "99 % below", "same first", "weights/s", "memory")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("format", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    chosen = report["recommendation"]["name"]
    for row in [*report["formats"], report["reference"]]:
        cells = row_cells(row)
        mark = "●" if row["name"] in report["front"] else " "
        style = "bold green" if row["name"] == chosen else ""
        table.add_row(Text(f"{mark} {row['name']}", style=style), *(cells[column] for column in columns))
    lines = [
        f"  {report['num_tokens']:,} tokens of {report['subject']['data']} in {report['num_windows']:,} windows, "
        f"computed in {report['subject']['dtype']}; ● no other format is smaller without losing more",
        "  loss and divergence: nats a token, from the unpacked model",
        *(
            f"  {_VERDICTS[saying['verdict']]}: {saying['claim']} ({saying['measured']})"
            for saying in report["sayings"]
        ),
    ]
    if chosen is not None:
        word = "recommended" if report["recommendation"]["within"] else "closest"
        lines.append(f"  {word}: {chosen}, {report['recommendation']['reason']}")
        lines.append(f"  ingle quantize {report['subject']['model']} --to {chosen} --out PATH")
    if out is not None:
        lines.append(f"  {out / 'formats.html'} shows it")
    return [table, *(Text(line) for line in lines)]


_VERDICTS = {"yes": "true here too", "no": "not true here", "in part": "true in part", "open": "not measured"}
