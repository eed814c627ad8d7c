"""``ingle config show`` and ``ingle config schema``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from ingle.cli.configs import CONFIG, Words, load_config

if TYPE_CHECKING:
    from ingle.config import LoadedRun


def show(words: Annotated[Words, CONFIG] = None) -> None:
    """Print every option of a run, its value, and where that comes from: the default, the file or a flag.

    On a terminal it is a table, elsewhere YAML that `ingle train` takes.
    """
    from ingle.config.loader import to_yaml

    loaded = load_config(words, "config show", ("--help",))
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    console = Console(highlight=False)
    if console.is_terminal:
        _print_table(console, loaded)
    else:
        print(to_yaml(loaded.run, loaded.origins), end="")


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

    Editors that know JSON Schema complete and check a config with it.
    """
    from ingle.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
