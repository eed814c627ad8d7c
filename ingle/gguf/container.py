"""GGUF files: metadata and the places of tensors; nothing stays mapped.

A file is: magic ``GGUF``, version, counts; typed key-value metadata; for every tensor its name, sizes (innermost
first), type and offset; padding; the tensors, each padded.  All numbers are little-endian.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingle.errors import GgufError

#: How ``struct`` and numpy spell a metadata type.
SCALARS = {
    0: "B",  # uint8
    1: "b",  # int8
    2: "H",  # uint16
    3: "h",  # int16
    4: "I",  # uint32
    5: "i",  # int32
    6: "f",  # float32
    7: "?",  # bool
    10: "Q",  # uint64
    11: "q",  # int64
    12: "d",  # float64
}

#: What to do about a file that is not whole.
DAMAGED = "fetch or copy the file again; it is damaged or incomplete"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor in a file.

    Attributes:
        name: As in the file, ``blk.0.attn_q.weight``.
        type_name: ggml's name of its type in lower case, ``q4_k`` or ``f32``.
        shape: Outermost size first, as torch has it.
        offset: First byte in the file.
        path: The file.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    path: Path

    @property
    def num_rows(self) -> int:
        """Rows of all matrices together."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return row_bytes(self.type_name, self.shape[-1] if self.shape else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return self.num_rows * self.row_bytes

    def read(self) -> NDArray[np.uint8]:
        """Its bytes as they are in the file, ``[rows, bytes of a row]``.

        Raises:
            GgufError: When the file ends early.
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
    """What a file, or all files of a split model, hold.

    Attributes:
        path: The (first) file.
        version: Of the container.
        metadata: Values as plain Python; float32 ones are the shortest decimals that mean the same.
        types: ggml's name of the type of each scalar, or of the items of an array, in lower case: with them
            :func:`ingle.gguf.write_gguf` writes the very same bytes.
        tensors: By name, in the order of the file.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    types: dict[str, str]
    tensors: dict[str, GgufTensor]


def block_of(type_name: str) -> tuple[int, int]:
    """Weights and bytes of one block of a type; a plain number is a block of one.

    Raises:
        GgufError: When there is no such type.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        size, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    except KeyError:
        raise GgufError(f"GGUF has no tensors of type {type_name!r}.") from None
    return size, num_bytes


def row_bytes(type_name: str, num_columns: int) -> int:
    """Bytes of a row of a type.

    Raises:
        GgufError: When there is no such type, or the row is not a whole number of blocks.
    """
    size, num_bytes = block_of(type_name)
    if num_columns % size:
        raise GgufError(f"Rows of {num_columns} weights are not whole blocks of {size} of {type_name}.")
    return num_columns // size * num_bytes
