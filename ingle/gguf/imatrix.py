"""Reads and writes llama.cpp's importance matrices: GGUF files, and (read only) the older ``.dat`` files.

For every weight of a model, a GGUF imatrix contains ``NAME.in_sum2`` (sum of squares of each input column) and
``NAME.counts`` (number of tokens), with one row per expert of a stack. The importance of a column is their ratio.

Legend: E = experts (1 for a plain weight), I = columns.

Source: llama.cpp, ``tools/imatrix/imatrix.cpp``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ingle.errors import GgufError
from ingle.gguf.container import GgufFile
from ingle.gguf.reader import read_gguf
from ingle.gguf.writer import TensorToWrite, write_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME_BYTES, _MAX_COLUMNS = 1024, 1 << 28
_FIX = "use a file written by `llama-imatrix`, `train.imatrix` or `ingle quantize --data`"


@dataclass(frozen=True)
class ImatrixEntry:
    """Statistics of the inputs of one weight.

    Attributes:
        sums: Sums of squares, float32 ``[E, I]``.
        counts: Numbers of tokens in the sums, float32 ``[E]``.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    @property
    def mean(self) -> NDArray[np.float32]:
        """The importance of each column, ``[E, I]``; ones if there were no tokens, as in llama.cpp."""
        seen = self.counts[:, None] > 0
        ratio = self.sums / np.where(seen, self.counts[:, None], np.float32(1))
        return np.where(seen, ratio, np.float32(1)).astype(np.float32)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix of a model.

    Attributes:
        entries: By the weight's name in GGUF, ``blk.0.attn_q.weight``.
        datasets: Files that it was computed from.
        chunk_count: Number of texts that were read.
        chunk_size: Number of tokens in a text.
    """

    entries: dict[str, ImatrixEntry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0


def write_imatrix(path: Path | str, imatrix: Imatrix) -> None:
    """Writes an importance matrix as llama.cpp's ``imatrix`` tool does.

    Raises:
        CheckpointError: The disk is full.
    """
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(imatrix.datasets),
        "imatrix.chunk_count": imatrix.chunk_count,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    tensors = []
    for name, entry in sorted(imatrix.entries.items()):
        assert entry.sums.ndim == 2 and len(entry.sums) == len(entry.counts), f"{name}: sums do not match counts"
        tensors += [_float32(name + _SUMS, entry.sums), _float32(name + _COUNTS, entry.counts[:, None])]
    write_gguf(path, metadata, tensors)


def _float32(name: str, values: NDArray[np.float32]) -> TensorToWrite:
    return TensorToWrite(name, "f32", values.shape, lambda: values.astype(np.float32))


def read_imatrix(path: Path | str) -> Imatrix:
    """Reads an importance matrix of either file format.

    Raises:
        GgufError: The file is missing, damaged, or not an importance matrix.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                file.seek(0)
                return _LegacyReader(file, path).read()
    except (OSError, IsADirectoryError) as error:
        raise GgufError(f"{path.name} cannot be read.", where=str(path), why=str(error), fix="check the path") from None
    return _from_gguf(read_gguf(path))


def _from_gguf(file: GgufFile) -> Imatrix:
    kind = file.metadata.get("general.type", "missing")
    if kind != "imatrix":
        message = f"{file.path.name} is not an importance matrix."
        raise GgufError(message, where=str(file.path), why=f"general.type is {kind!r}", fix=_FIX)
    entries = {}
    for key, tensor in file.tensors.items():
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        counts = file.tensors.get(name + _COUNTS)
        if counts is None or tensor.type_name != "f32" or counts.type_name != "f32":
            raise _invalid(file.path, f"{name} has no counts, or they are not float32")
        sums_EI = tensor.read().view(np.float32).reshape(-1, tensor.shape[-1] if tensor.shape else 1)
        counts_E = counts.read().view(np.float32).reshape(-1)
        entries[name] = _make_entry(file.path, name, sums_EI, counts_E)
    datasets = file.metadata.get("imatrix.datasets", [])
    chunks = [file.metadata.get(f"imatrix.{key}", 0) for key in ("chunk_count", "chunk_size")]
    if not isinstance(datasets, list) or any(type(count) is not int for count in chunks):
        raise _invalid(file.path, "imatrix.datasets, imatrix.chunk_count or imatrix.chunk_size has the wrong type")
    return Imatrix(entries, tuple(str(each) for each in datasets), *chunks)


def _make_entry(path: Path, name: str, sums_EI: NDArray[np.float32], counts_E: NDArray[np.float32]) -> ImatrixEntry:
    if len(sums_EI) != len(counts_E):
        raise _invalid(path, f"{name} has sums of {len(sums_EI)} matrices and counts of {len(counts_E)}")
    entry = ImatrixEntry(sums_EI, counts_E)
    for values in (sums_EI, counts_E):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise _invalid(path, f"{name} contains values that are negative or not finite")
    with np.errstate(over="ignore"):
        if not np.isfinite(entry.mean).all():
            raise _invalid(path, f"{name} has sums that are too large for its counts")
    return entry


class _LegacyReader:
    """Reads the ``.dat`` format, which stores means times the number of chunks and has no end marker.

    Args:
        file: Open at its beginning.
        path: Path of the file for errors.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._left = path.stat().st_size

    def read(self) -> Imatrix:
        """Reads the file; counts are numbers of chunks here."""
        count = self._int(1, 1 << 20, "entries")
        entries = {}
        for _ in range(count):
            name = self._bytes(self._int(1, _MAX_NAME_BYTES, "name bytes")).decode("utf-8", "replace")
            calls = self._int(0, (1 << 31) - 1, "calls")
            columns = self._int(1, _MAX_COLUMNS, "values")
            sums = np.frombuffer(self._bytes(4 * columns), "<f4").astype(np.float32)[None]
            if name in entries:
                raise _invalid(self._path, f"{name[:100]} occurs twice")
            entries[name] = _make_entry(self._path, name, sums, np.array([calls], np.float32))
        rest = self._file.read()  # optional: number of chunks and data set
        chunks = struct.unpack_from("<i", rest)[0] if len(rest) >= 4 else 0
        dataset = rest[8:].decode("utf-8", "replace") if len(rest) > 8 else ""
        return Imatrix(entries, (dataset,) if dataset else (), max(0, chunks))

    def _int(self, low: int, high: int, what: str) -> int:
        value = int(struct.unpack("<i", self._bytes(4))[0])
        if not low <= value <= high:
            raise _invalid(self._path, f"invalid number of {what}: {value}")
        return value

    def _bytes(self, count: int) -> bytes:
        if count > self._left:  # checked before reading, so that a damaged length allocates nothing
            raise _invalid(self._path, "the file ends early")
        self._left -= count
        return self._file.read(count)


def _invalid(path: Path, why: str) -> GgufError:
    message = f"{path.name} is damaged or not an importance matrix."
    return GgufError(message, where=str(path), why=why, fix=_FIX)
