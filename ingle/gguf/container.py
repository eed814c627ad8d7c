"""The content of a GGUF file: metadata and the positions of its tensors. Files are never memory-mapped.

A file consists of the magic ``GGUF``, version and counts; typed key-value metadata; name, sizes (innermost first), type
and offset of every tensor; padding; and the padded tensors. All numbers are little-endian.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingle.errors import GgufError

#: The ``fix`` of errors about incomplete files.
DAMAGED = "download or copy the file again; it is damaged or incomplete"
#: llama.cpp stores sizes of models in 32 bits.
_LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor in a file.

    Attributes:
        name: As in the file, ``blk.0.attn_q.weight``.
        type_name: ggml's name of the type in lower case, ``q4_k`` or ``f32``.
        shape: Outermost size first, as in torch.
        offset: Position of the first byte in the file.
        path: The file.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    path: Path

    @property
    def num_rows(self) -> int:
        """Number of rows of all matrices together."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return row_bytes(self.type_name, self.shape[-1] if self.shape else 1)

    @property
    def num_bytes(self) -> int:
        """Size in the file in bytes, without padding."""
        return self.num_rows * self.row_bytes

    def read(self) -> NDArray[np.uint8]:
        """Reads the bytes of the tensor, ``[rows, row bytes]``.

        Raises:
            GgufError: The file ends early.
        """
        data = np.empty((self.num_rows, self.row_bytes), np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            view = memoryview(data.reshape(-1).data)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise GgufError(f"{self.path.name} ends early.", where=f"{self.path}, {self.name}", fix=DAMAGED)
                done += count
        return data


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The content of a file, or of all files of a split model.

    Attributes:
        path: The (first) file.
        metadata: Values as plain Python objects; float32 values are the shortest decimals that round to them.
        tensors: By name, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class ArchitectureValues:
    """Checked access to the metadata of an architecture.

    Args:
        file: The file.
        architecture: llama.cpp's name of the architecture, the prefix of the keys.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self.architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value without a check."""
        return self._file.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """Returns an integer of at least ``low``.

        Raises:
            GgufError: The value is invalid, or the key is missing and there is no default.
        """
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= _LARGEST:
            raise self._bad(key, value)
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """Returns a finite number above 0, or of at least 0 with ``zero``.

        Raises:
            GgufError: The value is invalid, or the key is missing and there is no default.
        """
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf or (value == 0 and not zero):
            raise self._bad(key, value)
        return float(value)

    def _bad(self, key: str, value: Any) -> GgufError:
        problem = "is missing" if value is None else f"is {str(value)[:60]}, which is not supported"
        return GgufError(f"{self.architecture}.{key} {problem}.", where=str(self._file.path))


def block_of(type_name: str) -> tuple[int, int]:
    """Returns the number of weights and bytes of one block of a type; a plain number is a block of one.

    Raises:
        GgufError: There is no such type.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    except KeyError:
        raise GgufError(f"GGUF has no tensor type {type_name!r}.") from None
    return size, num_bytes


def row_bytes(type_name: str, num_columns: int) -> int:
    """Returns the size of a row of a type in bytes.

    Raises:
        GgufError: There is no such type, or the row is not a multiple of its block size.
    """
    size, num_bytes = block_of(type_name)
    if num_columns % size:
        raise GgufError(f"Rows of {num_columns} weights are not a multiple of the block size {size} of {type_name}.")
    return num_columns // size * num_bytes
