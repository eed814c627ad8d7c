"""A combination of options that makes no sense: when, why, where, and what to type instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ingle.config.section import Section

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Rule(Generic[S]):
    """One forbidden combination.

    Attributes:
        name: What tests and the reference call it.
        applies: Whether a config is forbidden by it.
        message: What is wrong, with the numbers.
        where: The options it concerns, separated by commas.
        fix: What to type instead.
    """

    name: str
    applies: Callable[[S], bool]
    message: Callable[[S], str]
    where: str
    fix: Callable[[S], str]
