"""Reading the config that a command names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ingle.cli.words import split_words
from ingle.errors import ConfigError

if TYPE_CHECKING:
    from ingle.config import LoadedRun

#: What a command that takes a config and overrides gets.
Words = list[str] | None
CONFIG: Any = typer.Argument(
    metavar="CONFIG|--a.b=c", show_default=False, help="A YAML file, and options that win over it."
)


def load_config(words: Words, command: str, flags: Collection[str]) -> LoadedRun:
    """Reads the config file among the words of a command line, and lays the overrides over it.

    Args:
        words: The words that are no options of the command.
        command: Its name, for the error.
        flags: Its options, for "did you mean".

    Raises:
        ConfigError: There are several files, or nothing at all, or something is wrong with the options.
    """
    from ingle.config import Run, load_run

    files, overrides = split_words(words, known=Run.model_fields, flags=flags)
    if len(files) > 1:
        raise ConfigError(
            f"One config file at a time, not {len(files)}: {', '.join(files)}.",
            fix=f"ingle {command} {files[0]}; overrides are written --section.option=value",
        )
    if not files and not overrides:
        raise ConfigError("No config file is given.", fix=f"ingle {command} CONFIG.yaml")
    return load_run(Path(files[0]) if files else None, overrides)
