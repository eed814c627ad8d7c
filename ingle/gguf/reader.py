"""Reads the header of a GGUF file, or of all files of a split model.

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
from ingle.gguf.container import DAMAGED, GgufFile, GgufTensor

#: Supported versions, whose lengths have 64 bits.
VERSIONS = (2, 3)
#: Codes of scalar metadata types in ``struct`` and numpy, by GGUF's number of the type.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))

_MAX_DIMENSIONS = 4
_CHUNK_BYTES = 1 << 20
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_gguf(path: Path | str) -> GgufFile:
    """Reads metadata and the list of tensors; for a split model (``...-00001-of-00003.gguf``), of all files.

    Raises:
        GgufError: The file is missing, damaged, truncated, big-endian, of an unsupported version or has an unknown
            tensor type; or a file of a split model is missing.
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
            fix="download or copy the missing files",
        )
    files = [_read_one(part) for part in parts]
    tensors: dict[str, GgufTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise GgufError(
                    f"The tensor {name} is in two files of the model.", where=f"{tensors[name].path} and {file.path}"
                )
            tensors[name] = tensor
    expected = files[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise GgufError(
            "The files of this model do not belong together.",
            where=str(path.parent),
            why=f"they contain {len(tensors)} tensors instead of {expected}",
            fix=DAMAGED,
        )
    first = files[0]
    kept = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    return GgufFile(first.path, kept, tensors)


def _read_one(path: Path) -> GgufFile:
    try:
        with open(path, "rb") as file:
            return _Reader(file, path).read()
    except (OSError, IsADirectoryError) as error:
        raise GgufError(f"{path.name} cannot be read.", where=str(path), why=str(error), fix="check the path") from None


class _Reader:
    """Reads one header. Every length in it is checked against the size of the file before it is used."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = path.stat().st_size
        self._buffer = b""
        self._at = 0  # position in the buffer
        self._left = self._size  # bytes of the file after that position

    def read(self) -> GgufFile:
        magic = self._take(min(4, self._size))
        if magic != b"GGUF":
            if magic == b"vers":
                raise GgufError(
                    f"{self._path.name} is a Git LFS pointer, not a model.", where=str(self._path), fix="git lfs pull"
                )
            raise GgufError(
                f"{self._path.name} is not a GGUF file.", where=str(self._path), why=f"it starts with {magic!r}"
            )
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            swapped = version & 0xFFFF == 0
            raise GgufError(
                f"{self._path.name} is a big-endian GGUF file."
                if swapped
                else f"GGUF version {version} is not supported.",
                where=str(self._path),
                why=f"supported are versions {VERSIONS[0]} to {VERSIONS[-1]}, little-endian",
                fix="convert the model again with a current llama.cpp",
            )
        num_tensors, num_values = self._unpack("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the key {key} occurs twice")
            metadata[key] = self._value(key)
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment}")
        start = -(-(self._size - self._left) // alignment) * alignment
        return GgufFile(self._path, metadata, self._place(entries, start, alignment))

    def _place(
        self, entries: list[tuple[str, str, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Returns the tensors by name. As in llama.cpp, each must start where the previous one ends."""
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, type_name, shape, offset in entries:
            if name in tensors:
                raise self._damaged(f"the tensor {name} occurs twice")
            tensor = GgufTensor(name, type_name, shape, start + offset, self._path)
            try:
                num_bytes = tensor.num_bytes
            except GgufError as error:
                raise self._damaged(f"{name}: {error.message}") from None
            if offset != expected:
                raise self._damaged(f"{name} starts at byte {offset:,} of the tensors instead of {expected:,}")
            if tensor.offset + num_bytes > self._size:
                raise self._damaged(f"{name} ends at byte {tensor.offset + num_bytes:,} of {self._size:,}")
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
                f"{name} has an unknown type, number {number}.",
                where=str(self._path),
                fix="upgrade the gguf package, or choose a file of another type",
            ) from None
        return name, type_name, shape, offset

    def _value(self, key: str) -> Any:
        kind = self._kind(key)
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            (value,) = self._unpack(SCALARS[kind])
            if kind == GGUFValueType.FLOAT32:
                value = float(str(np.float32(value)))
            return value
        item = self._kind(key)
        (count,) = self._unpack("Q")
        if item == GGUFValueType.STRING:
            self._require(8 * count)
            return [self._string() for _ in range(count)]
        if item == GGUFValueType.ARRAY:
            raise self._damaged(f"{key} is an array of arrays")
        values = np.frombuffer(self._take(count * struct.calcsize(SCALARS[item])), f"<{SCALARS[item]}")
        return values.tolist()

    def _kind(self, key: str) -> GGUFValueType:
        (number,) = self._unpack("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._damaged(f"{key} has the unknown type {number}") from None

    def _string(self) -> str:
        raw = self._take(int.from_bytes(self._take(8), "little"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"a string is not UTF-8: {raw[:40]!r}") from None

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", self._take(struct.calcsize(f"<{layout}")))

    def _take(self, num_bytes: int) -> bytes:
        # A vocabulary has hundreds of thousands of short strings, so each must cost no more than a slice of the buffer.
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
            raise self._damaged(f"its {self._size:,} bytes end inside the header")

    def _damaged(self, why: str) -> GgufError:
        return GgufError(f"{self._path.name} is damaged or incomplete.", where=str(self._path), why=why, fix=DAMAGED)
