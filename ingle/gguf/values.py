"""What a GGUF file says of its architecture, read with the type that a key must have."""

from __future__ import annotations

import math
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.container import GgufFile

#: Sizes of models have 32 bits in llama.cpp.
_LARGEST = 2**31 - 1


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

    def whole(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """A whole number from ``low`` on; without a default the key must be there."""
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= _LARGEST:
            raise self._bad(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number from 0 on; without a default the key must be there."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self._bad(key, value)
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; without a default the key must be there."""
        if not (value := self.number(key, default)):
            raise self._bad(key, value)
        return value

    def _bad(self, key: str, value: Any) -> GgufError:
        what = "is missing" if value is None else f"is {str(value)[:60]}, which is not supported"
        return GgufError(f"{self._architecture}.{key} {what}.", where=str(self._file.path))
