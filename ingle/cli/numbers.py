"""Numbers on the command line: finite, and no larger than 64 bits hold.

The library that reads options checks the bounds of each; an option without an upper bound takes infinity and whole
numbers of any length.  Checking here, for all commands, keeps a new option from forgetting that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ingle.errors import ConfigError

_LARGEST = 2**63 - 1


def checked(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same command, which refuses numbers that no machine can use."""

    @functools.wraps(command)
    def run(**options: Any) -> Any:
        for name, value in options.items():
            if isinstance(value, int | float) and not abs(value) <= _LARGEST:  # false for NaN too
                problem = "is too large" if math.isfinite(value) else "is not a finite number"
                raise ConfigError(f"--{name.replace('_', '-')} {value} {problem}.")
        return command(**options)

    return run
