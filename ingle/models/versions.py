"""Which transformers this is made for: looked at before anything else of it is imported.

The loader follows transformers' own tables of renamed and fused weights, which came with version 5 and settled in 5.4.
"""

from __future__ import annotations

from importlib.metadata import version

from ingle.errors import DependencyError

#: The oldest version whose models pass the contract tests (fused experts are packed from later ones on).
OLDEST_TRANSFORMERS = (5, 4)


def check_transformers(installed: str) -> None:
    """Refuses a transformers that is too old.

    Raises:
        DependencyError: With what to install.
    """
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise DependencyError(
            f"transformers {installed} is too old: {oldest} or later is needed.",
            fix=f"pip install 'transformers>={oldest},<6'",
        )


check_transformers(version("transformers"))
