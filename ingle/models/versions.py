"""Checks the installed transformers before anything else imports it.

Loading relies on transformers' tables of renamed and fused weights, which exist since version 5 and are stable since
5.4.
"""

from __future__ import annotations

from importlib.metadata import version

from ingle.errors import DependencyError

#: The oldest version whose models pass the contract tests (earlier ones do not fuse experts).
OLDEST_TRANSFORMERS = (5, 4)


def check_transformers(installed: str) -> None:
    """Refuses a transformers that is too old.

    Raises:
        DependencyError: It names the version to install.
    """
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise DependencyError(
            f"The installed transformers {installed} is too old; {oldest} or later is needed.",
            fix=f"pip install 'transformers>={oldest},<6'",
        )


check_transformers(version("transformers"))
