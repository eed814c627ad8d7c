"""What a GGUF file says of its architecture, read with the type that a key must have."""

from __future__ import annotations

from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import GgufFile


class ArchitectureValues:
    """The metadata under an architecture's prefix; a :class:`~ingle.errors.GgufError` names the key that is wrong.

    Args:
        file: The file.
        architecture: llama.cpp's name, the prefix of the keys.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self._architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._file.metadata.get(f"{self._architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default the key must be there."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._bad(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; without a default the key must be there."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._bad(key, value)
        return float(value)

    def _bad(self, key: str, value: Any) -> GgufError:
        what = "is missing" if value is None else f"is {str(value)[:60]}, which is not supported"
        return GgufError(f"{self._architecture}.{key} {what}.", where=str(self._file.path))
