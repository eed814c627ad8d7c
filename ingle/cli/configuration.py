"""``ingle config show`` and ``ingle config schema``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from ingle.cli.arguments import CONFIG, Words, load_config

if TYPE_CHECKING:
    from ingle.config import LoadedRun


def show(words: Annotated[Words, CONFIG] = None) -> None:
    """Print every option of a run with its value and its origin: the default, the file or a flag.

    Prints a table on a terminal, and otherwise YAML that `ingle train` accepts.
    """
    from ingle.config.loader import to_yaml

    loaded = _with_learning_rate(load_config(words, "config show", ("--help",)))
    for note in loaded.notes:
        print(f"Note: {note}", file=sys.stderr)
    console = Console(highlight=False)
    if console.is_terminal:
        _print_table(console, loaded)
    else:
        print(to_yaml(loaded.run, loaded.origins), end="")


def _with_learning_rate(loaded: LoadedRun) -> LoadedRun:
    """Returns the run with the learning rate that it will have, and what that follows from."""
    run = loaded.run
    if run.optim.lr is not None:
        return loaded
    origin = f"default of {run.objective.kind} {'without an' if run.adapter.kind == 'none' else 'with an'} adapter"
    run = run.model_copy(update={"optim": run.optimizer})
    return replace(loaded, run=run, origins={**loaded.origins, "optim.lr": origin})


def _print_table(console: Console, loaded: LoadedRun) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ingle.config.document import write_value
    from ingle.config.loader import leaves

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("option", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    section = ""
    for path, value in leaves(loaded.run.model_dump(mode="json")):
        if path[0] != section and section:
            table.add_section()
        section = path[0]
        origin = loaded.origins[".".join(path)]
        style = {"file": "cyan", "flag": "green"}.get(origin, "dim")
        table.add_row(".".join(path), Text(write_value(value), style=style), Text(origin, style=style))
    console.print(table)


def schema() -> None:
    """Print the JSON Schema of a config file: every option with its type, default and description.

    Editors with JSON Schema support use it to complete and check configs.
    """
    from ingle.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
