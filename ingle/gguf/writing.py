"""Writes GGUF files tensor by tensor, whole or not at all."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_VERSION, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from ingle.atomic import atomic_file
from ingle.gguf.container import SCALARS, row_bytes


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """One tensor and how to get its bytes.

    Attributes:
        name: As GGUF calls it.
        type_name: ggml's type in lower case.
        shape: Outermost size first.
        data: Makes its bytes, an array of any dtype and shape; called once, when it is its turn.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    data: Callable[[], NDArray[Any]]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, without padding."""
        return prod(self.shape[:-1]) * row_bytes(self.type_name, self.shape[-1] if self.shape else 1)


def write_gguf(
    path: Path | str,
    metadata: Mapping[str, Any],
    tensors: Iterable[TensorToWrite],
    *,
    types: Mapping[str, str] | None = None,
) -> None:
    """Writes a GGUF file (version 3); at most one tensor is in memory.

    The bytes are those of the ``gguf`` package's writer for the same keys in the same order.

    Args:
        path: Where; replaced when all is written.
        metadata: ``general.architecture`` first, as readers expect.  A Python int is written as uint32 (int32 if it is
            negative, uint64 if large), a float as float32, items of a list as int32, float32, bool or string.  An
            empty list is left out, since it has no type.
        tensors: In the order they get in the file.
        types: Other types by key, as :class:`ingle.gguf.GgufFile` has them.

    Raises:
        GgufError: When a row is not a whole number of blocks of its type.
        CheckpointError: When the disk is full.
    """
    listed = list(tensors)
    assert len({tensor.name for tensor in listed}) == len(listed), "a tensor is there twice"
    types = types or {}
    alignment = int(metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
    values = {key: value for key, value in metadata.items() if not (_is_array(value) and len(value) == 0)}
    header = bytearray(b"GGUF" + struct.pack("<IQQ", GGUF_VERSION, len(listed), len(values)))
    for key, value in values.items():
        header += _string(key) + _typed(key, value, types.get(key))
    offset = 0
    for tensor in listed:
        sizes = tensor.shape[::-1]
        number = GGMLQuantizationType[tensor.type_name.upper()]
        header += _string(tensor.name)
        header += struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)
        offset += _padded(tensor.num_bytes, alignment)
    with atomic_file(Path(path)) as file:
        _write_padded(file, header, alignment)
        for tensor in listed:
            _write_tensor(file, tensor, alignment)


def _write_tensor(file: BinaryIO, tensor: TensorToWrite, alignment: int) -> None:
    """A function of its own, so that the tensor is let go before the next is made."""
    data = np.ascontiguousarray(tensor.data())
    assert data.nbytes == tensor.num_bytes, (
        f"{tensor.name}: {data.nbytes} bytes are not {tensor.shape} as {tensor.type_name}"
    )
    _write_padded(file, data.reshape(-1).view(np.uint8).data, alignment)


def _typed(key: str, value: Any, name: str | None) -> bytes:
    """A value with its type before it."""
    items = value if _is_array(value) else [value]
    kind = GGUFValueType[name.upper()] if name is not None else _guess(items, is_array=_is_array(value))
    head = struct.pack("<I", kind)
    if _is_array(value):
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value))
    if kind == GGUFValueType.STRING:
        assert all(isinstance(item, str) for item in items), f"{key} is no text"
        return head + b"".join(_string(item) for item in items)
    return head + struct.pack(f"<{len(items)}{SCALARS[kind]}", *items)


def _guess(items: Sequence[Any], *, is_array: bool) -> GGUFValueType:
    first = items[0]
    if isinstance(first, str):
        return GGUFValueType.STRING
    if isinstance(first, bool):
        return GGUFValueType.BOOL
    if isinstance(first, float):
        return GGUFValueType.FLOAT32
    assert isinstance(first, int), f"metadata cannot hold {type(first).__name__}"
    lowest, highest = min(items), max(items)
    if is_array or lowest < 0:
        return GGUFValueType.INT32 if highest < 2**31 and lowest >= -(2**31) else GGUFValueType.INT64
    return GGUFValueType.UINT32 if highest < 2**32 else GGUFValueType.UINT64


def _is_array(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _padded(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment


def _write_padded(file: BinaryIO, content: bytes | bytearray | memoryview, alignment: int) -> None:
    file.write(content)
    file.write(bytes(_padded(len(content), alignment) - len(content)))
