"""``ingle data inspect``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingle.cli.arguments import CONFIG, Words, load_config, split_words
from ingle.errors import ConfigError, ModelError
from ingle.events import Warned

if TYPE_CHECKING:
    from ingle.config import LoadedRun, Run
    from ingle.data.row_encoder import ModelKind

_FLAGS = ("--model", "--num-previews", "--margins", "--json", "--debug", "--help")


def inspect(
    words: Annotated[Words, CONFIG] = None,
    model: Annotated[
        str | None, typer.Option(show_default=False, help="Model whose tokenizer is used for a data file.")
    ] = None,
    num_previews: Annotated[int, typer.Option(min=0, help="Number of documents to show token by token.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    margins: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            metavar="ROWS",
            help="Load the weights too, and measure how likely the model makes the answers of so many rows.",
        ),
    ] = None,
) -> None:
    """Show the training data as the model sees it: supervised tokens, lengths, packing, duplicates and overlap.

    Accepts a config or a data file. A data file without `--model` is only checked row by row.

    Loads the tokenizer of the model, but not its weights unless `--margins` needs them, and trains nothing.
    """
    from ingle.config import Run

    files, overrides = split_words(words, known=Run.model_fields, flags=_FLAGS)
    file = files[0] if len(files) == 1 and _is_data_file(files[0]) else None
    if model is not None:
        overrides = [*overrides, f"--model.id={model}"]
    if file is None:
        loaded = load_config([*files, *overrides], "data inspect", _FLAGS)
    elif any(override.startswith("--model.") for override in overrides):
        loaded = _load_for(file, overrides)
    else:
        if margins is not None:
            raise ConfigError("Margins need a model.", where="--margins", fix="--model PATH_OR_ID")
        _inspect_rows(file, overrides, num_previews, as_json)
        return
    from ingle.cli.tokenizer_loading import load_apart
    from ingle.data.inspection import inspect as inspect_data
    from ingle.report.data_tables import render_report
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    run = loaded.run
    with Terminal(make_console(stderr=True)) as terminal:
        for note in loaded.notes:
            terminal(Warned(note))
        tokenizer = load_apart(run.model)
        report = inspect_data(
            run.data,
            tokenizer,
            run.objective,
            run.task,
            model_kind=_read_kind(run),
            num_previews=num_previews,
            seed=run.seed,
            sink=terminal,
        )
        found = None
        if margins is not None:
            from ingle.margins import describe, measure_margins

            found = measure_margins(run, margins, terminal)
    if as_json:
        more = {} if found is None else {"margins": asdict(found)}
        print(json.dumps(asdict(report) | more, ensure_ascii=False))
        return
    render_report(report, make_console())
    if found is not None:
        print("\n".join(describe(found)))


def _read_kind(run: Run) -> ModelKind:
    """Returns the kind of the model where documents depend on it; a folder with a tokenizer alone counts as causal."""
    from ingle.config.objective import TRAINS, reads_answers, samples_answers

    if not (reads_answers(run.objective.kind) or samples_answers(run.objective.kind)):
        return "causal"
    from ingle import models
    from ingle.models.loading.config_json import read_config

    try:
        config = read_config(run.model, None)
    except ModelError:
        return "causal"
    models.require_kind(config, TRAINS[run.objective.kind], run.objective.kind)
    return models.kind_of(config)


def _is_data_file(word: str) -> bool:
    """Returns whether a word has the suffix of a data file."""
    from ingle.config.data import SUFFIXES

    return Path(word.lower().removesuffix(".gz")).suffix in SUFFIXES


def _load_for(file: str, overrides: Sequence[str]) -> LoadedRun:
    """Returns a config for a data file; the file decides on an objective that the overrides do not name."""
    from ingle.config import load_run
    from ingle.data.inspection import guess_file

    sources = json.dumps([{"path": file}], ensure_ascii=False)
    kind = [] if any(o.startswith("--objective") for o in overrides) else [f"--objective.kind={guess_file(file)}"]
    return load_run(None, [f"--data.sources={sources}", "--output=none", *kind, *overrides])


def _inspect_rows(file: str, overrides: Sequence[str], num_previews: int, as_json: bool) -> None:
    from ingle.data.inspection import inspect_rows
    from ingle.report.data_tables import render_rows
    from ingle.sinks.terminal import make_console

    if overrides:
        raise ConfigError(
            "Overrides need a tokenizer; without a model, the data file is only checked row by row.",
            where=overrides[0],
            fix=f"ingle data inspect {file} --model PATH_OR_ID {' '.join(overrides)}",
        )
    report = inspect_rows(file, num_previews=num_previews)
    if as_json:
        print(json.dumps(asdict(report), ensure_ascii=False))
    else:
        render_rows(report, make_console())
