"""Reads the header of a GGUF file, or of all files of a split model, with plain file reads.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from ingle.errors import GgufError
from ingle.gguf.container import DAMAGED, SCALARS, GgufFile, GgufTensor

#: Versions whose lengths have 64 bits.
VERSIONS = (2, 3)

_MAX_DIMENSIONS = 4
_CHUNK_BYTES = 1 << 20
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_gguf(path: Path | str) -> GgufFile:
    """Reads metadata and the list of tensors; of a split model (``...-00001-of-00003.gguf``) all files.

    Raises:
        GgufError: When the file is missing, damaged, cut short, big-endian, of another version, of an unknown tensor
            type, or one of the files of a split model is missing.
    """
    path = Path(path)
    split = _SPLIT_NAME.match(path.name)
    if split is None or int(split["count"]) <= 1:
        return _read_one(path)
    count = int(split["count"])
    parts = [path.with_name(f"{split['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise GgufError(
            f"{len(missing)} of the {count} files of this model are missing: {', '.join(missing[:3])}.",
            where=str(path.parent),
            fix="fetch or copy the missing files",
        )
    files = [_read_one(part) for part in parts]
    tensors: dict[str, GgufTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise GgufError(f"The tensor {name} is in two files.", where=f"{tensors[name].path} and {file.path}")
            tensors[name] = tensor
    expected = files[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise GgufError(
            f"The files of this model do not belong together: they hold {len(tensors)} tensors, not {expected}.",
            where=str(path.parent),
            fix=DAMAGED,
        )
    first = files[0]
    kept = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    return GgufFile(first.path, first.version, kept, {key: first.types[key] for key in kept}, tensors)


def _read_one(path: Path) -> GgufFile:
    try:
        with open(path, "rb") as file:
            return _Reader(file, path).read()
    except (OSError, IsADirectoryError) as error:
        raise GgufError(f"{path.name} cannot be read.", where=str(path), why=str(error), fix="check the path") from None


class _Reader:
    """Reads one header; every length in it is checked against the size of the file before it is believed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = path.stat().st_size
        self._buffer = b""
        self._at = 0  # in the buffer
        self._left = self._size  # bytes after that
        # A vocabulary has hundreds of thousands of short texts: each costs a slice of the buffer and nothing more.

    def read(self) -> GgufFile:
        magic = self._take(min(4, self._size))
        if magic != b"GGUF":
            if magic == b"vers":
                raise GgufError(
                    f"{self._path.name} is a Git LFS pointer, not a model.", where=str(self._path), fix="git lfs pull"
                )
            raise GgufError(
                f"{self._path.name} is no GGUF file.", where=str(self._path), why=f"it begins with {magic!r}"
            )
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0
            raise GgufError(
                f"{self._path.name} is a big-endian GGUF file." if swapped else f"GGUF version {version} is not known.",
                where=str(self._path),
                why=f"versions {VERSIONS[0]} to {VERSIONS[-1]}, little-endian, are read",
                fix="convert the model anew with a current llama.cpp",
            )
        num_tensors, num_values = self._unpack("QQ")
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"{key} is there twice")
            metadata[key], types[key] = self._value(key)
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment}")
        start = -(-(self._size - self._left) // alignment) * alignment
        return GgufFile(self._path, version, metadata, types, self._place(entries, start, alignment))

    def _place(
        self, entries: list[tuple[str, str, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """The tensors by name; each begins where the one before it ends, as llama.cpp demands, so none share bytes."""
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, type_name, shape, offset in entries:
            if name in tensors:
                raise self._damaged(f"the tensor {name} is there twice")
            tensor = GgufTensor(name, type_name, shape, start + offset, self._path)
            try:
                num_bytes = tensor.num_bytes
            except GgufError as error:
                raise self._damaged(f"{name}: {error.message}") from None
            if offset != expected:
                raise self._damaged(f"{name} begins at byte {offset:,} of the tensors, not at {expected:,}")
            if tensor.offset + num_bytes > self._size:
                raise self._damaged(f"it holds {self._size:,} bytes, and {name} ends at {tensor.offset + num_bytes:,}")
            expected = -(-(offset + num_bytes) // alignment) * alignment
            tensors[name] = tensor
        return tensors

    def _entry(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self._string()
        (num_dimensions,) = self._unpack("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {num_dimensions} dimensions")
        shape = self._unpack("Q" * num_dimensions)[::-1]
        if 0 in shape:
            raise self._damaged(f"{name} has no elements: {list(shape)}")
        number, offset = self._unpack("IQ")
        try:
            type_name = GGMLQuantizationType(number).name.lower()
        except ValueError:
            raise GgufError(
                f"{name} is of a type that is not known, number {number}.",
                where=str(self._path),
                fix="upgrade the gguf package, or choose a file in another type",
            ) from None
        return name, type_name, shape, offset

    def _value(self, key: str) -> tuple[Any, str]:
        kind = self._kind(key)
        if kind == GGUFValueType.STRING:
            return self._string(), "string"
        if kind != GGUFValueType.ARRAY:
            (value,) = self._unpack(SCALARS[kind])
            if kind == GGUFValueType.FLOAT32:
                value = float(str(np.float32(value)))
            return value, kind.name.lower()
        item = self._kind(key)
        (count,) = self._unpack("Q")
        if item == GGUFValueType.STRING:
            self._require(8 * count)
            return [self._string() for _ in range(count)], "string"
        if item == GGUFValueType.ARRAY:
            raise self._damaged(f"{key} is an array of arrays")
        values = np.frombuffer(self._take(count * struct.calcsize(SCALARS[item])), f"<{SCALARS[item]}")
        return values.tolist(), item.name.lower()

    def _kind(self, key: str) -> GGUFValueType:
        (number,) = self._unpack("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._damaged(f"{key} is of type {number}") from None

    def _string(self) -> str:
        raw = self._take(int.from_bytes(self._take(8), "little"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"a name or text is not UTF-8: {raw[:40]!r}") from None

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self._take(struct.calcsize(f"<{layout}")))

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if end > len(self._buffer):
            self._require(num_bytes)
            self._buffer = self._buffer[self._at :] + self._file.read(max(num_bytes, _CHUNK_BYTES))
            self._at, end = 0, num_bytes
        taken = self._buffer[self._at : end]
        self._at = end
        self._left -= num_bytes
        return taken

    def _require(self, num_bytes: int) -> None:
        if num_bytes > self._left:
            raise self._damaged(f"its {self._size:,} bytes end within the header")

    def _damaged(self, why: str) -> GgufError:
        return GgufError(f"{self._path.name} is not a whole GGUF file.", where=str(self._path), why=why, fix=DAMAGED)
