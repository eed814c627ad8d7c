"""Writes GGUF files atomically, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.constants import GGUF_DEFAULT_ALIGNMENT
from numpy.typing import NDArray

from ingle.atomic import atomic_file
from ingle.gguf.container import row_bytes


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """A tensor and a function that returns its bytes.

    Attributes:
        name: As in the file.
        type_name: ggml's name of the type in lower case.
        shape: Outermost size first.
        data: Returns its bytes as an array of any dtype and shape; called once, when the tensor is written.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: Callable[[], NDArray[Any]]

    @property
    def num_bytes(self) -> int:
        """Size in the file in bytes, without padding."""
        return prod(self.shape[:-1]) * row_bytes(self.type_name, self.shape[-1] if self.shape else 1)


def write_gguf(path: Path | str, metadata: Mapping[str, Any], tensors: Iterable[TensorToWrite]) -> None:
    """Writes a GGUF file (version 3) with at most one tensor in memory.

    Args:
        path: The file. It is replaced after everything has been written.
        metadata: ``general.architecture`` first, as readers expect. A Python int is written as uint32 (int32 if it is
            negative, uint64 if it is large), a float as float32, and items of a list as int32, float32, bool or string,
            those of bytes as uint8. Empty lists are omitted, because they have no type.
        tensors: In the order of the file.

    Raises:
        GgufError: A row is not a multiple of the block size of its type.
        CheckpointError: The disk is full.
    """
    listed = list(tensors)
    assert len({tensor.name for tensor in listed}) == len(listed), "two tensors have the same name"
    writer = GGUFWriter(None, arch="")  # writes no architecture by itself
    writer.data_alignment = int(metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
    for key, value in metadata.items():
        if value != [] and value != ():
            writer.add_key_value(key, value, *_value_types(value))
    for tensor in listed:
        # The package writes tensors of one dtype as they are; uint8 would mean that the shape counts bytes.
        kind = GGMLQuantizationType[tensor.type_name.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=kind)
    with atomic_file(Path(path)) as file:
        with closing(writer):
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        file.seek(0, os.SEEK_END)
        writer.write_padding(file, file.tell())
        for tensor in listed:
            _write_tensor(file, tensor)
            writer.write_padding(file, tensor.num_bytes)


def _write_tensor(file: BinaryIO, tensor: TensorToWrite) -> None:
    # A function of its own frees the tensor before the next one is made. Unlike the package's ``tofile``, ``write``
    # reports a full disk.
    data = np.ascontiguousarray(tensor.data())
    assert data.nbytes == tensor.num_bytes, (
        f"{tensor.name}: {data.nbytes} bytes do not match {tensor.shape} as {tensor.type_name}"
    )
    file.write(data.reshape(-1).view(np.uint8).data)


def _value_types(value: Any) -> tuple[GGUFValueType, GGUFValueType | None]:
    """Returns the type of a value and, for an array, of its items."""
    if isinstance(value, bytes):
        return GGUFValueType.ARRAY, GGUFValueType.UINT8
    if isinstance(value, list | tuple):
        return GGUFValueType.ARRAY, _scalar_type(value, is_signed=True)
    return _scalar_type([value], is_signed=False), None


def _scalar_type(items: Sequence[Any], *, is_signed: bool) -> GGUFValueType:
    if not isinstance(items[0], int) or isinstance(items[0], bool):
        return GGUFValueType.get_type(items[0])
    lowest, highest = min(items), max(items)
    if is_signed or lowest < 0:
        return GGUFValueType.INT32 if highest < 2**31 and lowest >= -(2**31) else GGUFValueType.INT64
    return GGUFValueType.UINT32 if highest < 2**32 else GGUFValueType.UINT64
