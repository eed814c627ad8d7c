"""The tokenized dataset.

In memory, all documents lie end to end in one int32 array, with one bool per token for the loss mask and one int64
offset per document: 5 bytes per token and about 20 per document. Only datasets whose rows have several texts or labels
have further arrays. Large datasets are on disk, see :mod:`ingle.data.shards`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ingle.data.types import IGNORE_INDEX, Ids, Mask, Sample
from ingle.report.data_results import DataStats

Offsets = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class TextGroups:
    """Documents that are the texts of one row. The documents of a row are adjacent.

    Attributes:
        offsets: int64 [R + 1], index of the first document of each row; the last is the number of documents.
        names: The names of texts.
        name_of: int16 [D], index into ``names`` of each document's text.
    """

    offsets: Offsets
    names: tuple[str, ...]
    name_of: npt.NDArray[np.int16]


class Tokens(Protocol):
    """The tokens of documents, in memory or on disk."""

    @property
    def lengths(self) -> Lengths:
        """Tokens of each document, [D]."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""

    @property
    def largest_id(self) -> int:
        """The largest token id of all documents."""

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns of tokens."""

    def read(self, i: int) -> tuple[Ids, Mask, Mapping[str, npt.NDArray[Any]]]:
        """Returns document ``i``: its tokens, those that carry loss, and its columns of tokens."""

    def origin(self, i: int) -> str:
        """Returns ``file:line`` of document ``i``."""

    def closing_ids(self) -> Ids:
        """Returns the last supervised token of each document, int32 [D]."""

    def row_keys(self) -> npt.NDArray[np.uint64]:
        """Returns two hashes of each document's row, [D, 2], see :func:`~ingle.data.duplicates.link_keys`."""

    @property
    def memo(self) -> Path | None:
        """A file for the fingerprint; files next to it can keep what else is computed once. None without a cache."""

    def fingerprint(self, labels: Sequence[memoryview | bytes]) -> str:
        """Returns a SHA-256 of offsets, tokens, masks, columns of tokens and labels of documents."""


class FlatTokens:
    """The tokens of documents in flat arrays.

    Args:
        ids: int32 [N], tokens of all documents.
        supervised: bool [N], tokens that carry loss.
        offsets: int64 [D + 1], where documents begin; the last is N.
        origins: ``file:line`` of the documents.
        columns: Labels and types of tokens by name, [N].

    Attributes:
        keys: What :meth:`row_keys` returns; None if it is not needed.
    """

    memo = None

    def __init__(
        self,
        ids: Ids,
        supervised: Mask,
        offsets: Offsets,
        origins: Origins,
        columns: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.columns = dict(columns or {})
        sizes = {len(ids), len(supervised), *map(len, self.columns.values())}
        assert sizes == {offsets[-1]}, "arrays do not fit together"
        self.ids, self.supervised, self.offsets, self.origins = ids, supervised, offsets, origins
        self.keys: npt.NDArray[np.uint64] | None = None
        self.lengths: Lengths = np.diff(offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.ids)

    @property
    def largest_id(self) -> int:
        """The largest token id of all documents."""
        return int(self.ids.max())

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        arrays = (self.ids, self.supervised, self.offsets, self.lengths, *self.columns.values())
        return sum(array.nbytes for array in arrays) + self.origins.nbytes

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns of tokens."""
        return tuple(self.columns)

    def read(self, i: int) -> tuple[Ids, Mask, Mapping[str, npt.NDArray[Any]]]:
        """Returns document ``i``: its tokens, those that carry loss, and its columns of tokens."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.supervised[part], {name: c[part] for name, c in self.columns.items()}

    def origin(self, i: int) -> str:
        """Returns ``file:line`` of document ``i``."""
        return self.origins.at(i)

    def closing_ids(self) -> Ids:
        """Returns the last supervised token of each document, int32 [D]."""
        return closing_ids(self.ids, self.supervised, self.offsets)

    def row_keys(self) -> npt.NDArray[np.uint64]:
        """Returns two hashes of each document's row, [D, 2], see :func:`~ingle.data.duplicates.link_keys`."""
        assert self.keys is not None, "the data was read without data.validation"
        return self.keys

    def fingerprint(self, labels: Sequence[memoryview | bytes]) -> str:
        """Returns a SHA-256 of offsets, tokens, masks, columns of tokens and labels of documents."""
        digest = hashlib.sha256()
        columns = (column.data for column in self.columns.values())
        for part in (self.offsets.data, self.ids.data, self.supervised.data, *columns, *labels):
            digest.update(part)
        return digest.hexdigest()


def closing_ids(ids: Ids, supervised: Mask, offsets: npt.NDArray[np.signedinteger[Any]]) -> Ids:
    """Returns the last supervised token of each document, int32 [D]."""
    if len(offsets) == 1:
        return ids[:0]
    places = np.where(supervised, np.arange(len(ids)), 0)
    last: Ids = ids[np.maximum.reduceat(places, offsets[:-1])]
    return last


class TokenDataset:
    """Tokenized documents.

    Args:
        tokens: The documents.
        stats: Figures of the dataset.
        groups: The rows of the documents; None if every document is a row.
        document_columns: Labels of documents by name, [D] or [D, C].

    Attributes:
        tokens: As given.
        lengths: [D], tokens of each document.
        stats: Figures of the dataset.
        groups: The rows of the documents; None where every document is a row.
    """

    def __init__(
        self,
        tokens: Tokens,
        stats: DataStats,
        groups: TextGroups | None = None,
        document_columns: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.tokens = tokens
        self.lengths: Lengths = tokens.lengths
        self.stats = stats
        self.groups = groups
        self._document_columns = dict(document_columns or {})
        assert all(len(column) == len(self) for column in self._document_columns.values()), "a document lacks a label"
        if groups is not None:
            assert len(groups.name_of) == len(self) == groups.offsets[-1], "some rows have several texts and some one"
            rows = np.arange(len(groups.offsets) - 1, dtype=np.int64)
            self._document_columns["group_ids"] = np.repeat(rows, np.diff(groups.offsets))

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def sample(self, i: int) -> Sample:
        """Returns document ``i``.

        Its columns are its labels and, where rows have several texts, ``group_ids``: the number of its row.
        """
        ids, supervised, columns = self.tokens.read(i)
        labels = np.where(supervised, ids, np.int32(IGNORE_INDEX))
        own = {name: column[i : i + 1] for name, column in self._document_columns.items()}
        return Sample(ids, labels, {**columns, **own})

    def has_document_column(self, name: str) -> bool:
        """Returns whether documents have a label of this name."""
        return name in self._document_columns

    def document_column(self, name: str) -> npt.NDArray[Any]:
        """Returns a label of all documents, [D] or [D, C], such as ``document_labels``."""
        return self._document_columns[name]

    def label_counts(self, num_labels: int) -> npt.NDArray[np.int64]:
        """Counts the documents, or the words of ``tag``, with each label; int64 [C].

        Args:
            num_labels: C, the number of classes or tags.
        """
        if "token_labels" in self.tokens.column_names:
            parts = (self.tokens.read(i)[2]["token_labels"] for i in range(len(self)))
            return sum((_count_labels(part, num_labels) for part in parts), np.zeros(num_labels, np.int64))
        labels = self._document_columns["document_labels"]
        return (labels == 1).sum(0) if labels.ndim == 2 else _count_labels(labels, num_labels)

    def last_ids(self) -> frozenset[int]:
        """Returns the tokens that documents end with."""
        return frozenset(int(self.tokens.read(i)[0][-1]) for i in range(len(self)))

    def origin(self, i: int) -> str:
        """Returns ``file:line`` of document ``i``."""
        return self.tokens.origin(i)

    def text_name(self, i: int) -> str:
        """Returns the name of document ``i`` among the texts of its row; empty if every document is a row."""
        return self.groups.names[self.groups.name_of[i]] if self.groups is not None else ""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self.tokens.num_tokens

    @property
    def largest_id(self) -> int:
        """The largest token id of all documents."""
        return self.tokens.largest_id

    @property
    def nbytes(self) -> int:
        """Memory of the arrays in bytes."""
        return self.tokens.nbytes + sum(array.nbytes for array in self._labels())

    def closing_ids(self) -> Ids:
        """Returns the last supervised token of each document, int32 [D]."""
        return self.tokens.closing_ids()

    def row_keys(self) -> npt.NDArray[np.uint64]:
        """Returns two hashes of each document's row, [D, 2], see :func:`~ingle.data.duplicates.link_keys`."""
        return self.tokens.row_keys()

    @property
    def memo(self) -> Path | None:
        """The file that keeps the fingerprint; None without a cache."""
        return self.tokens.memo

    def fingerprint(self) -> str:
        """Returns a SHA-256 of documents, masks, rows and labels; equal data has equal fingerprints."""
        groups = self.groups.names if self.groups is not None else ()
        names = (*self.tokens.column_names, *self._document_columns, *groups)
        labels = [np.ascontiguousarray(array).data for array in self._labels()]
        return self.tokens.fingerprint([*labels, "\0".join(names).encode()])

    def _labels(self) -> list[npt.NDArray[Any]]:
        arrays: list[npt.NDArray[Any]] = list(self._document_columns.values())
        return [*arrays, self.groups.name_of] if self.groups is not None else arrays


def _count_labels(labels: npt.NDArray[Any], num_labels: int) -> npt.NDArray[np.int64]:
    known = labels[labels >= 0].astype(np.int64)
    return np.bincount(known, minlength=num_labels)


_DIGITS = "0123456789"

#: Numbers that wait until they are appended together.
_SINGLE = 4096


class GrowingArray:
    """A one-dimensional array that grows in place, so that the peak is not twice its size."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._data: npt.NDArray[Any] = np.empty(1024, dtype=dtype)
        self._size = 0
        self._single: list[int] = []  # appended numbers, which a list takes much faster

    def extend(self, values: npt.ArrayLike) -> None:
        """Appends values."""
        if self._single:
            self._flush()
        added = values if isinstance(values, np.ndarray) and values.ndim else np.atleast_1d(np.asarray(values))
        needed = self._size + len(added)
        if needed > len(self._data):
            # realloc moves pages instead of copying them; no view of the array exists here
            self._data.resize(max(needed, len(self._data) * 3 // 2), refcheck=False)
        self._data[self._size : needed] = added
        self._size = needed

    def append(self, value: int) -> int:
        """Appends a number; returns its index."""
        self._single.append(value)
        if len(self._single) == _SINGLE:
            self._flush()
            return self._size - 1
        return self._size + len(self._single) - 1

    def _flush(self) -> None:
        values, self._single = self._single, []
        self.extend(np.array(values, dtype=self._data.dtype))

    def view(self) -> npt.NDArray[Any]:
        """Returns the values; no view may exist when the array grows."""
        if self._single:
            self._flush()
        return self._data[: self._size]

    def close(self) -> npt.NDArray[Any]:
        """Returns the values and frees the rest."""
        if self._single:
            self._flush()
        self._data.resize(self._size, refcheck=False)
        return self._data


class Origins:
    """``file:line`` of many documents in 4 bytes each."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._starts: list[int] = []  # documents from which names hold
        self._line_of = GrowingArray(np.int32)

    def append(self, origin: str) -> int:
        """Appends the origin of a document or row; returns its index."""
        name = origin.rstrip(_DIGITS)  # ends in ":" or ":row "
        self._begin(name)
        return self._line_of.append(int(origin[len(name) :]))

    def extend(self, origins: Sequence[str]) -> None:
        """Appends the origins of several documents or rows, which is fast if they are of one table."""
        name = origins[0].rstrip(_DIGITS) if origins else ""
        lines = [origin.removeprefix(name) for origin in origins]
        if name and all(map(str.isdecimal, lines)):
            self._begin(name)
            self._line_of.extend(np.array(list(map(int, lines)), np.int32))
            return
        for origin in origins:
            self.append(origin)

    def at(self, i: int) -> str:
        """Returns ``file:line`` of document ``i``."""
        return f"{self._names[bisect_right(self._starts, i) - 1]}{self._line_of.view()[i]}"

    def _begin(self, name: str) -> None:
        if not self._names or name != self._names[-1]:
            self._names.append(name)
            self._starts.append(len(self._line_of.view()))

    def numbers(self, prefix: str, base: int) -> npt.NDArray[np.int32]:
        """Returns the numbers of all documents, less ``base``; every origin begins with ``prefix``."""
        assert set(self._names) <= {prefix}, f"{prefix} is not the only table"
        return self._line_of.view() - np.int32(base)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self._line_of.view().nbytes
