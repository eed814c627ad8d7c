"""``ingle rank`` and ``ingle methods``: studies that answer a question about a task by many short runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ingle.cli.arguments import CONFIG, Words, check_writable, load_config
from ingle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

    from rich.console import RenderableType

_FLAGS = (
    *("--space", "--method", "--dims", "--ranks", "--seeds", "--rates", "--steps", "--threshold", "--budget"),
    *("--every-rank", "--json", "--html", "--debug", "--help"),
)
_METHOD_FLAGS = ("--methods", "--seeds", "--rates", "--steps", "--budget", "--json", "--html", "--debug", "--help")


def rank(
    words: Annotated[Words, CONFIG] = None,
    space: Annotated[
        Literal["lora", "full"], typer.Option(help="Search in the space of LoRA's factors, or of all weights.")
    ] = "lora",
    method: Annotated[
        Literal["did", "said", "both"],
        typer.Option(help="Random directions alone (did), with a gain per tensor (said), or both."),
    ] = "did",
    dims: Annotated[
        str | None, typer.Option(metavar="A,B,C", show_default=False, help="Dimensions; powers of 4 by default.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="A,B,C", show_default=False, help="Ranks; powers of 4 by default.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, show_default=False, help="Seeds; 3, or fewer to fit the budget.")
    ] = None,
    rates: Annotated[
        int | None, typer.Option(min=1, max=9, show_default=False, help="Learning rates of each configuration; 3.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Steps of each trial; those of the config.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the gain of unrestricted training to reach.")
    ] = 0.9,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0.0, show_default=False, help="Reduce the grid until it fits this time."),
    ] = None,
    every_rank: Annotated[
        bool, typer.Option("--every-rank", help="Measure the curve for every rank, not for the recommended one alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with charts to this file.")] = None,
) -> None:
    """Measure how many parameters a task needs, and recommend a rank of LoRA.

    Trains the config with several ranks, and along a rising number of random directions (intrinsic dimension), each at
    its best learning rate and with several seeds. The score is the loss on `data.validation`, or on 10 % of the rows.
    Every trial is an ordinary run in `OUTPUT/trials`. To continue an interrupted study, repeat the command.
    """
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    if html is not None:
        check_writable(html, "--html", "rank.html")
    loaded = load_config(words, "rank", _FLAGS)
    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.studies import RankRequest, study_rank

        request = RankRequest(
            run=loaded.run,
            space=space,
            methods=("did", "said") if method == "both" else (method,),
            dims=_numbers(dims, "--dims"),
            ranks=_numbers(ranks, "--ranks"),
            num_seeds=seeds,
            num_rates=rates,
            steps=steps,
            threshold=threshold,
            budget_s=None if budget is None else 60 * budget,
            every_rank=every_rank,
        )
        content = study_rank(request, terminal).to_dict()
    _publish(content, loaded.run.output, "rank", html, as_json=as_json)


def methods(
    words: Annotated[Words, CONFIG] = None,
    names: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B,C", show_default=False, help="Compare only these; all by default."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, show_default=False, help="Seeds; 3, or fewer to fit the budget.")
    ] = None,
    rates: Annotated[
        int | None, typer.Option(min=1, max=9, show_default=False, help="Learning rates of each method; 3.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, show_default=False, help="Steps of each trial; those of the config.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0.0, show_default=False, help="Use fewer seeds to fit this time."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with charts to this file.")] = None,
) -> None:
    """Compare ways to adapt a model on your task: full fine-tuning, LoRA, DoRA, adapters, prefix, prompt and others.

    All methods make the same steps on the same rows, each at its best learning rate and with several seeds. The score
    is the task of `evaluate`, or the loss on held-out rows. A method that the model does not allow is a row with the
    reason. Every trial is an ordinary run in `OUTPUT/trials`. To continue an interrupted study, repeat the command.
    """
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    if html is not None:
        check_writable(html, "--html", "methods.html")
    loaded = load_config(words, "methods", _METHOD_FLAGS)
    with Terminal(make_console(stderr=True)) as terminal:
        from ingle.studies import MethodRequest, study_methods

        request = MethodRequest(
            run=loaded.run,
            names=None if names is None else tuple(name.strip() for name in names.split(",") if name.strip()),
            num_seeds=seeds,
            num_rates=rates,
            steps=steps,
            budget_s=None if budget is None else 60 * budget,
        )
        content = study_methods(request, terminal).to_dict()
    _publish(content, loaded.run.output, "methods", html, as_json=as_json)


def _publish(content: Mapping[str, Any], output: str, name: str, html: Path | None, *, as_json: bool) -> None:
    """Writes the JSON and the page of a study, and prints its tables or its JSON."""
    from ingle.atomic import write_atomically
    from ingle.report.study_pages import render_study_page, study_tables
    from ingle.sinks.terminal import make_console, show

    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(Path(output) / f"{name}.json", text.encode())
    if html is not None:
        write_atomically(html, render_study_page(content, name).encode())
    if as_json:
        print(text, end="")
        return
    tables, lines = study_tables(content, name)
    if html is not None:
        lines.append(f"Charts: {html}")
    show(make_console(), *_render(tables, lines))


def _render(
    tables: Sequence[tuple[str, Sequence[Mapping[str, str]]]], lines: Sequence[str]
) -> Iterator[RenderableType]:
    from rich import box
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    for title, rows in tables:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row.values())
        yield table
    yield from (Padding(Text(line), (0, 0, 0, 2)) for line in lines)


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1:
        raise ConfigError(f"{option} needs whole numbers from 1, separated by commas.", where=f"{option} {text}")
    return numbers
