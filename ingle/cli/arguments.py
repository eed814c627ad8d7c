"""Parses the arguments of commands: config files, overrides and numbers."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ingle.errors import ConfigError
from ingle.wording import nearest

if TYPE_CHECKING:
    from ingle.config import LoadedRun

#: Type and declaration of the arguments of a command that takes a config and overrides.
Words = list[str] | None
CONFIG: Any = typer.Argument(
    metavar="CONFIG|--a.b=c", show_default=False, help="A YAML file, and options that override it."
)
_LARGEST = 2**63 - 1


def split_words(
    words: Sequence[str] | None, *, known: Collection[str], flags: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Splits words into arguments and overrides; ``--a.b c`` takes the next word as its value.

    Args:
        words: Words as typed, in order.
        known: First keys of existing overrides (``model``, ``optim``, ...).
        flags: Options of the command, for "did you mean".

    Returns:
        The arguments, and the overrides for the config loader.

    Raises:
        ConfigError: A flag is neither an override nor an option of the command.
    """
    arguments: list[str] = []
    overrides: list[str] = []
    rest = list(words or ())
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            arguments.append(word)
            continue
        _check_flag(word, known, flags)
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return arguments, overrides


def _check_flag(word: str, known: Collection[str], flags: Collection[str]) -> None:
    name = word.partition("=")[0]
    if name.startswith("--") and ("." in name or name[2:] in known):
        return
    # The config loader reports all other unknown names, with suggestions from the config tree.
    close = nearest(name, flags, 0.75)
    if close or not name.startswith("--"):
        fix = f"did you mean {close}?" if close else "see --help"
        raise ConfigError(f"{name} is not an option of this command.", fix=fix)


def load_config(words: Words, command: str, flags: Collection[str]) -> LoadedRun:
    """Loads the config file among the words of a command line, with the overrides applied.

    Args:
        words: The words that are not options of the command.
        command: The name of the command, for errors.
        flags: The options of the command, for "did you mean".

    Raises:
        ConfigError: There are several files, no file and no overrides, or invalid options.
    """
    from ingle.config import Run, load_run

    files, overrides = split_words(words, known=Run.model_fields, flags=flags)
    if len(files) > 1:
        raise ConfigError(
            f"The command accepts one config file, not {len(files)}: {', '.join(files)}.",
            fix=f"ingle {command} {files[0]}; write overrides as --section.option=value",
        )
    if not files and not overrides:
        raise ConfigError("No config file is given.", fix=f"ingle {command} CONFIG.yaml")
    return load_run(Path(files[0]) if files else None, overrides)


def check_writable(file: Path, option: str, example: str) -> None:
    """Refuses a file that could not be written, before the work on its content begins.

    Args:
        file: The file.
        option: The option that names it, for errors.
        example: The name of such a file.

    Raises:
        ConfigError: It is a folder, or its folder cannot be created or written.
    """
    if file.is_dir():
        raise ConfigError(f"{file} is a folder.", where=f"{option} {file}", fix=f"{option} {file / example}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The folder {file.parent} cannot be created.",
            where=f"{option} {file}",
            why=error.strerror,
            fix="use another file",
        ) from error
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(
            f"The folder {file.parent} is not writable.", where=f"{option} {file}", fix="use another file"
        )


def with_checked_numbers(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a command so that it refuses numbers that are not finite or exceed 64 bits.

    Typer checks the bounds of each option, but an option without an upper bound accepts infinity and integers of any
    length. Checking all commands here covers new options too.
    """

    @functools.wraps(command)
    def checked(**options: Any) -> Any:
        for name, value in options.items():
            if isinstance(value, int | float) and not abs(value) <= _LARGEST:  # also true for NaN
                problem = "is too large" if math.isfinite(value) else "is not a finite number"
                raise ConfigError(f"--{name.replace('_', '-')} {value} {problem}.")
        return command(**options)

    return checked
