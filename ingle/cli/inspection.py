"""``ingle data inspect``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ingle.cli.configs import CONFIG, Words, load_config
from ingle.events import Warned

_FLAGS = ("--num-previews", "--json", "--debug", "--help")


def inspect(
    words: Annotated[Words, CONFIG] = None,
    num_previews: Annotated[int, typer.Option(min=0, help="Documents shown token by token.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model would learn from: tokens coloured by supervision, lengths, packing, duplicates, overlap.

    Nothing is trained, and of the model only the tokenizer is read.
    """
    loaded = load_config(words, "data inspect", _FLAGS)
    from ingle import models
    from ingle.data import doctor
    from ingle.sinks import Terminal
    from ingle.sinks.terminal import make_console

    run = loaded.run
    with Terminal(make_console(stderr=True)) as terminal:
        for note in loaded.notes:
            terminal(Warned(note))
        tokenizer = models.load_tokenizer(run.model)
        report = doctor.inspect(
            run.data,
            tokenizer,
            run.objective.kind,
            run.evaluate,
            num_previews=num_previews,
            seed=run.seed,
            sink=terminal,
        )
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        doctor.render_report(report, make_console())
