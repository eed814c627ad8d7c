"""Defines the ``ingle`` command and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from ingle import __version__
from ingle.cli import (
    chat,
    configuration,
    doctor,
    evaluation,
    expanding,
    exporting,
    formats,
    generation,
    inspection,
    launching,
    model_types,
    planning,
    predicting,
    quantizing,
    studying,
    training,
)
from ingle.cli.arguments import with_checked_numbers

app = typer.Typer(
    name="ingle",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
config = typer.Typer(no_args_is_help=True, help="Show configs.")
data = typer.Typer(no_args_is_help=True, help="Inspect training data.")


def _print_version(requested: bool) -> None:
    if requested:
        print(f"ingle {__version__}")
        raise typer.Exit


@app.callback()
def ingle(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. Accepted at any position.")] = False,
) -> None:
    """Fine-tune and evaluate large language models on the hardware you own."""


_WITH_OVERRIDES = {"ignore_unknown_options": True}

app.command("train", context_settings=_WITH_OVERRIDES)(training.train)
app.command("plan", context_settings=_WITH_OVERRIDES)(planning.plan)
app.command("launch", context_settings=_WITH_OVERRIDES)(launching.launch)
app.command("rehearse", context_settings=_WITH_OVERRIDES)(launching.rehearse)
app.command("generate")(generation.generate)
app.command("chat")(chat.chat)
app.command("predict")(predicting.predict)
app.command("evaluate", context_settings=_WITH_OVERRIDES)(evaluation.evaluate)
app.command("quantize")(quantizing.quantize)
app.command("expand")(expanding.expand)
app.command("formats")(formats.formats)
app.command("rank", context_settings=_WITH_OVERRIDES)(studying.rank)
app.command("methods", context_settings=_WITH_OVERRIDES)(studying.methods)
app.command("models")(model_types.models)
app.command("export")(exporting.export)
app.add_typer(data, name="data")
data.command("inspect", context_settings=_WITH_OVERRIDES)(inspection.inspect)
app.add_typer(config, name="config")
config.command("show", context_settings=_WITH_OVERRIDES)(configuration.show)
config.command("schema")(configuration.schema)
app.command("doctor")(doctor.doctor)

for group in (app, data, config):
    for entry in group.registered_commands:
        assert entry.callback is not None
        entry.callback = with_checked_numbers(entry.callback)
