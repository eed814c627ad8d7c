"""``ingle data inspect``."""

from __future__ import annotations

from typing import Annotated

from ingle.cli.configs import CONFIG, Words, load_config


def inspect(words: Annotated[Words, CONFIG] = None) -> None:
    """Show what a model would learn from: tokens coloured by supervision, lengths, packing, duplicates, overlap."""
    loaded = load_config(words, "data inspect", ("--help",))
    raise NotImplementedError(loaded)
