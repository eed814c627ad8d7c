"""Tokenized chunks as files, and the documents of many such files as one dataset.

A shard is a safetensors file with the tokens of one :class:`~ingle.data.chunks.Chunk`: ``ids`` (int32) and
``supervised`` (bool) of all documents, their ``lengths`` (int32), the ``numbers`` of the rows that they come from
(int32, relative to the chunk), hashes of all rows for the search for held-out rows, and in its header the counts. Rows
with labels or several texts have further arrays: columns of tokens and of documents, and the texts of each row. It
names no file, so the same rows in another file have the same shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from ingle.atomic import write_atomically
from ingle.data.dataset import Lengths, TextGroups, closing_ids
from ingle.data.duplicates import link_keys
from ingle.data.minhash import Hashes
from ingle.data.row_encoder import Counts, Tally
from ingle.data.row_tokenizer import Tokenized
from ingle.data.types import Ids, Mask
from ingle.errors import CheckpointError, IngleError

_DTYPES = {
    "BOOL": np.bool_,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U64": np.uint64,
    "F32": np.float32,
    "F64": np.float64,
}
#: What the names of columns begin with in a file.
_TOKEN, _DOCUMENT = "token.", "document."
#: Shards whose files stay open.
_NUM_OPEN = 256
#: Documents between two known positions.
_STRIDE = 128


@dataclass(frozen=True, slots=True)
class Shard:
    """The documents of a chunk.

    Attributes:
        ids: int32 [N].
        supervised: bool [N].
        lengths: int32 [D].
        numbers: int32 [D], rows of the documents, relative to the first row of the chunk.
        prompts: uint64 [R], see :class:`~ingle.data.duplicates.RowKeys`.
        rows: uint64 [R], likewise.
        openings: uint64 [R], likewise.
        row_numbers: int32 [R], as ``numbers``.
        largest_id: The largest of ``ids``; 0 without documents.
        counts: Figures; ``file:line`` of a row is its relative number.
        names: The names of texts, if rows have several.
        row_ends: int64 [R + 1], see :class:`~ingle.data.dataset.TextGroups`.
        name_of: int16 [D], likewise.
        columns: Columns of tokens ``token.NAME`` [N] and of documents ``document.NAME`` [D] or [D, C].
    """

    ids: Ids
    supervised: Mask
    lengths: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int32]
    prompts: Hashes
    rows: Hashes
    openings: Hashes
    row_numbers: npt.NDArray[np.int32]
    largest_id: int
    counts: Counts
    names: tuple[str, ...] = ()
    row_ends: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    name_of: npt.NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, np.int16))
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(array.nbytes for array in self._arrays().values())

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        own = {name: value for name in self.__slots__ if isinstance(value := getattr(self, name), np.ndarray)}
        if not self.names:
            own = {name: value for name, value in own.items() if name not in ("row_ends", "name_of")}
        return own | {name: np.ascontiguousarray(column) for name, column in self.columns.items()}

    def save(self, path: Path) -> None:
        """Writes the shard; the file is complete or does not exist.

        Raises:
            CheckpointError: The disk is full.
            OSError: The folder cannot be written.
        """
        metadata = {
            "counts": json.dumps(asdict(self.counts)),
            "largest_id": str(self.largest_id),
            "names": json.dumps(self.names),
            "columns": json.dumps(list(self.columns)),
        }
        write_atomically(path, save(self._arrays(), metadata))


def make_shard(found: Tokenized, prefix: str, base: int) -> Shard:
    """Returns the shard of a chunk whose origins are ``prefix`` and a number from ``base`` on."""
    tokens, (prompts, rows, openings) = found.tokens, found.keys.arrays()
    columns = {f"{_TOKEN}{name}": column for name, column in tokens.columns.items()}
    columns |= {f"{_DOCUMENT}{name}": column for name, column in found.document_columns.items()}
    texts: dict[str, Any] = {}
    if found.groups is not None:
        texts = {
            "names": found.groups.names,
            "row_ends": found.groups.offsets,
            "name_of": found.groups.name_of,
        }
    return Shard(
        tokens.ids,
        tokens.supervised,
        tokens.lengths.astype(np.int32),
        tokens.origins.numbers(prefix, base),
        prompts,
        rows,
        openings,
        found.keys.origins.numbers(prefix, base),
        int(tokens.ids.max(initial=0)),
        _map_origins(found.counts, lambda origin: str(int(origin.removeprefix(prefix)) - base)),
        columns=columns,
        **texts,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an array is in a file."""

    dtype: npt.DTypeLike
    position: int
    shape: tuple[int, ...]


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, _Place]]:
    """Returns the metadata and arrays of a safetensors file.

    Raises:
        ValueError: The file is not complete.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        length = os.fstat(file.fileno()).st_size
    metadata: dict[str, str] = header.pop("__metadata__")
    places = {}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        if stop > length:  # cut by a crash of the machine
            raise ValueError(f"{path} is not complete")
        places[name] = _Place(_DTYPES[entry["dtype"]], start, tuple(entry["shape"]))
    return metadata, places


def open_shard(path: Path) -> Shard | None:
    """Maps a shard into memory; None if there is no complete file."""
    try:
        metadata, places = _read_header(path)
        counts, largest_id = json.loads(metadata["counts"]), int(metadata["largest_id"])
        names = tuple(json.loads(metadata["names"]))
        arrays: dict[str, Any] = {name: _map_array(path, place) for name, place in places.items()}
        columns = {name: arrays.pop(name) for name in json.loads(metadata["columns"])}
    except (OSError, ValueError, KeyError):
        return None
    tallies = {name: Tally({k: (n, o) for k, (n, o) in t.items()}) for name, t in counts.items() if type(t) is dict}
    return Shard(**arrays, largest_id=largest_id, counts=Counts(**(counts | tallies)), names=names, columns=columns)


def _map_array(path: Path, place: _Place) -> npt.NDArray[Any]:
    if not np.prod(place.shape):  # nothing cannot be mapped
        return np.zeros(place.shape, place.dtype)
    return np.asarray(np.memmap(path, place.dtype, "r", place.position, place.shape))


class _Documents:
    """Reads single documents of a shard; the pages that it reads do not count as memory of the process."""

    def __init__(self, stored: Stored) -> None:
        self._shard = stored.shard if isinstance(stored.shard, Shard) else None
        if isinstance(stored.shard, Path):
            self._places = _read_header(stored.shard)[1]
            self._file = os.open(stored.shard, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def read(self, part: slice, columns: Sequence[str]) -> tuple[Ids, Mask, Mapping[str, npt.NDArray[Any]]]:
        if self._shard is not None:
            found = {name: self._shard.columns[_TOKEN + name][part] for name in columns}
            return self._shard.ids[part], self._shard.supervised[part], found
        found = {name: self._read(_TOKEN + name, part) for name in columns}
        return self._read("ids", part), self._read("supervised", part), found

    def _read(self, name: str, part: slice) -> npt.NDArray[Any]:
        place = self._places[name]
        size = np.dtype(place.dtype).itemsize
        content = os.pread(self._file, (part.stop - part.start) * size, place.position + part.start * size)
        return np.frombuffer(content, place.dtype)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the documents of a chunk are, and what their origins begin with.

    Attributes:
        shard: The file, or the shard itself if it could not be written.
        prefix: ``file:line`` without the number.
        base: Number of the first row.
    """

    shard: Path | Shard
    prefix: str
    base: int

    def load(self) -> Shard:
        """Returns the shard.

        Raises:
            IngleError: The file is gone.
        """
        shard = self.shard if isinstance(self.shard, Shard) else open_shard(self.shard)
        if shard is None:
            raise IngleError(
                "A file of the data cache is missing or damaged.",
                where=str(self.shard),
                fix="repeat the command, which tokenizes its rows again",
            )
        return shard

    def origin(self, number: int) -> str:
        """Returns ``file:line`` of a row."""
        return f"{self.prefix}{self.base + number}"

    def counts(self, shard: Shard) -> Counts:
        """Returns the figures of the shard with the origins of this chunk."""
        return _map_origins(shard.counts, lambda number: self.origin(int(number)))


class ShardedTokens:
    """The tokens of documents on disk.

    In memory are 4 bytes per document. Passes over all documents map one shard after another; single documents are
    read from open files, because in a shuffled order they would soon make every page of every map resident.

    Args:
        stored: The chunks with at least one document, in order.
        memo: A file that keeps the digest of the tokens; None if nothing can be written.
    """

    def __init__(self, stored: Sequence[Stored], memo: Path | None) -> None:
        self._stored, self.memo = stored, memo
        shards = [(len(shard.lengths), shard.largest_id) for shard in (each.load() for each in stored)]
        first = stored[0].load().columns
        self.column_names = tuple(name.removeprefix(_TOKEN) for name in first if name.startswith(_TOKEN))
        self.largest_id = max(largest for _, largest in shards)
        self._starts = np.cumsum([0, *(count for count, _ in shards)])
        lengths = np.empty(int(self._starts[-1]), dtype=np.int32)
        for each, start, stop in zip(stored, self._starts[:-1], self._starts[1:], strict=True):
            lengths[start:stop] = each.load().lengths
        self.lengths: Lengths = lengths
        self._token_starts = np.concatenate(
            [
                np.zeros(1, np.int64),
                np.cumsum(np.add.reduceat(lengths, np.arange(0, len(lengths), _STRIDE), dtype=np.int64)),
            ]
        )
        self._open = lru_cache(maxsize=_NUM_OPEN)(lambda k: _Documents(stored[k]))

    def _begin(self, i: int) -> int:
        """Returns the number of tokens before document ``i``."""
        block = i // _STRIDE
        return int(self._token_starts[block]) + int(self.lengths[block * _STRIDE : i].sum(dtype=np.int64))

    def _find(self, i: int) -> tuple[int, int]:
        """Returns the shard of document ``i``, and its index there."""
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return k, i - int(self._starts[k])

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._token_starts[-1])

    @property
    def nbytes(self) -> int:
        """Memory in bytes, without the pages of mapped files."""
        return int(self.lengths.nbytes + self._starts.nbytes + self._token_starts.nbytes)

    def groups(self) -> TextGroups | None:
        """Returns the rows of the documents; None if every document is a row."""
        shards = [each.load() for each in self._stored]
        if not shards[0].names:
            return None
        names = tuple(dict.fromkeys(name for shard in shards for name in shard.names))
        ends = [shard.row_ends[1:] + start for shard, start in zip(shards, self._starts[:-1], strict=True)]
        places = [np.array([names.index(name) for name in shard.names], np.int16) for shard in shards]
        name_of = np.concatenate([place[shard.name_of] for place, shard in zip(places, shards, strict=True)])
        return TextGroups(np.concatenate([np.zeros(1, np.int64), *ends]), names, name_of)

    def document_columns(self) -> dict[str, npt.NDArray[Any]]:
        """Returns the labels of all documents by name, [D] or [D, C]; they are kept in memory."""
        names = [name for name in self._stored[0].load().columns if name.startswith(_DOCUMENT)]
        return {
            name.removeprefix(_DOCUMENT): np.concatenate([each.load().columns[name] for each in self._stored])
            for name in names
        }

    def read(self, i: int) -> tuple[Ids, Mask, Mapping[str, npt.NDArray[Any]]]:
        """Returns document ``i``: its tokens, those that carry loss, and its columns of tokens."""
        k, _ = self._find(i)
        begin = self._begin(i) - self._begin(int(self._starts[k]))
        part = slice(begin, begin + int(self.lengths[i]))
        return self._open(k).read(part, self.column_names)

    def origin(self, i: int) -> str:
        """Returns ``file:line`` of document ``i``."""
        k, j = self._find(i)
        return self._stored[k].origin(int(self._stored[k].load().numbers[j]))

    def closing_ids(self) -> Ids:
        """Returns the last supervised token of each document, int32 [D]."""
        found = []
        for each in self._stored:
            shard = each.load()
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(shard.lengths, dtype=np.int64)])
            found.append(closing_ids(shard.ids, shard.supervised, offsets))
        return np.concatenate(found)

    def row_keys(self) -> Hashes:
        """Returns two hashes of each document's row, [D, 2], see :func:`~ingle.data.duplicates.link_keys`."""
        return np.concatenate([_document_keys(each.load()) for each in self._stored])

    def fingerprint(self, labels: Sequence[memoryview | bytes]) -> str:
        """Returns a SHA-256 of tokens and labels, as of a dataset in memory; computes it once."""
        if self.memo is not None and self.memo.is_file():
            return self.memo.read_text(encoding="ascii")
        digest = self._digest(labels)
        if self.memo is not None:
            with suppress(OSError, CheckpointError):
                write_atomically(self.memo, digest.encode())
        return digest

    def _digest(self, labels: Sequence[memoryview | bytes]) -> str:
        digest = hashlib.sha256(np.zeros(1, np.int64).data)
        total = 0
        for each in self._stored:
            ends = np.cumsum(each.load().lengths, dtype=np.int64) + total
            digest.update(ends.data)
            total = int(ends[-1])
        for each in self._stored:
            digest.update(each.load().ids.data)
        for each in self._stored:
            digest.update(each.load().supervised.data)
        for name in self.column_names:
            for each in self._stored:
                digest.update(each.load().columns[_TOKEN + name].data)
        for part in labels:
            digest.update(part)
        return digest.hexdigest()


def _document_keys(shard: Shard) -> Hashes:
    keys = link_keys(shard.prompts, shard.rows, shard.openings)
    found: Hashes = keys[np.searchsorted(shard.row_numbers, shard.numbers)]
    return found


def _map_origins(counts: Counts, change: Any) -> Counts:
    """Returns the counts with other origins of first rows."""
    changed = {name: Tally({k: (n, change(o)) for k, (n, o) in getattr(counts, name).items()}) for name in _TALLIES}
    return Counts(**({name: getattr(counts, name) for name in Counts.__slots__} | changed))


_TALLIES = ("dropped", "remarks", "control_tokens")
