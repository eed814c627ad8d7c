"""The words of a command line that are no options of the command: a config file and overrides."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from ingle.errors import ConfigError


def split_words(
    words: Sequence[str] | None, *, known: Collection[str], flags: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Sorts words into plain ones and overrides; ``--a.b c`` takes the word behind it.

    Args:
        words: As typed, in order.
        known: First keys of the overrides that exist (``model``, ``optim``, ...).
        flags: Options of the command itself, for "did you mean".

    Returns:
        The plain words, and the overrides in the form the config loader takes.

    Raises:
        ConfigError: A flag is neither an override nor an option of the command.
    """
    plain: list[str] = []
    overrides: list[str] = []
    rest = list(words or ())
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            plain.append(word)
            continue
        _check(word, known, flags)
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return plain, overrides


def _check(word: str, known: Collection[str], flags: Collection[str]) -> None:
    name = word.partition("=")[0]
    if name.startswith("--") and ("." in name or name[2:] in known):
        return
    # A single word close to an option of ours is a slip; anything else is looked up in the whole tree by the loader.
    close = difflib.get_close_matches(name, list(flags), n=1, cutoff=0.75)
    if close or not name.startswith("--"):
        raise ConfigError(
            f"{name} is not an option of this command.", fix=f"did you mean {close[0]}?" if close else "see --help"
        )
