"""The tokenized dataset in flat arrays.

All documents lie end to end in one int32 array, with one bool per token for the loss mask and one int64 offset per
document: 5 bytes per token and about 20 per document. Only datasets whose rows have several texts or labels have
further arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data.types import IGNORE_INDEX, Ids, Mask, Sample
from ingle.report.data_results import DataStats

Offsets = npt.NDArray[np.int64]


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


class TokenDataset:
    """Tokenized documents.

    Args:
        ids: int32 [N], tokens of all documents.
        supervised: bool [N], tokens that carry loss.
        offsets: int64 [D + 1], where documents begin; the last is N.
        origins: ``file:line`` of the documents.
        stats: Figures of the dataset.
        groups: The rows of the documents; None if every document is a row.
        token_columns: Labels of tokens by name, [N].
        document_columns: Labels of documents by name, [D].

    Attributes:
        lengths: int64 [D], tokens of each document.
        stats: Figures of the dataset.
        groups: The rows of the documents; None where every document is a row.
    """

    def __init__(
        self,
        ids: Ids,
        supervised: Mask,
        offsets: Offsets,
        origins: Origins,
        stats: DataStats,
        groups: TextGroups | None = None,
        token_columns: Mapping[str, npt.NDArray[Any]] | None = None,
        document_columns: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        assert len(ids) == len(supervised) == offsets[-1], "arrays do not fit together"
        self._ids, self._supervised, self._offsets, self._origins = ids, supervised, offsets, origins
        self.lengths: npt.NDArray[np.int64] = np.diff(offsets)
        self.stats = stats
        self.groups = groups
        self._token_columns = dict(token_columns or {})
        self._document_columns = dict(document_columns or {})
        assert all(len(column) == len(ids) for column in self._token_columns.values()), "a document lacks a label"
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
        part = slice(self._offsets[i], self._offsets[i + 1])
        ids = self._ids[part]
        labels = np.where(self._supervised[part], ids, np.int32(IGNORE_INDEX))
        columns = {name: column[part] for name, column in self._token_columns.items()}
        columns |= {name: column[i : i + 1] for name, column in self._document_columns.items()}
        return Sample(ids, labels, columns)

    def origin(self, i: int) -> str:
        """Returns ``file:line`` of document ``i``."""
        return self._origins.at(i)

    def text_name(self, i: int) -> str:
        """Returns the name of document ``i`` among the texts of its row; empty if every document is a row."""
        return self.groups.names[self.groups.name_of[i]] if self.groups is not None else ""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._ids)

    @property
    def largest_id(self) -> int:
        """The largest token id of all documents."""
        return int(self._ids.max())

    @property
    def nbytes(self) -> int:
        """Memory of the arrays in bytes."""
        return sum(array.nbytes for array in (*self._arrays(), self.lengths)) + self._origins.nbytes

    def closing_ids(self) -> Ids:
        """Returns the last supervised token of each document, int32 [D]."""
        places = np.where(self._supervised, np.arange(len(self._ids)), 0)
        last: Ids = self._ids[np.maximum.reduceat(places, self._offsets[:-1])]
        return last

    def fingerprint(self) -> str:
        """Returns a SHA-256 of documents, masks, rows and labels; equal data has equal fingerprints."""
        digest = hashlib.sha256()
        for array in self._arrays():
            digest.update(np.ascontiguousarray(array).data)
        names = (*self._token_columns, *self._document_columns, *(self.groups.names if self.groups else ()))
        digest.update("\0".join(names).encode())
        return digest.hexdigest()

    def _arrays(self) -> list[npt.NDArray[Any]]:
        arrays: list[npt.NDArray[Any]] = [self._offsets, self._ids, self._supervised]
        arrays += [*self._token_columns.values(), *self._document_columns.values()]
        return [*arrays, self.groups.name_of] if self.groups is not None else arrays


class GrowingArray:
    """A one-dimensional array that grows in place, so that the peak is not twice its size."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._data: npt.NDArray[Any] = np.empty(1024, dtype=dtype)
        self._size = 0

    def extend(self, values: npt.ArrayLike) -> None:
        """Appends values."""
        added = np.atleast_1d(np.asarray(values))
        needed = self._size + len(added)
        if needed > len(self._data):
            # realloc moves pages instead of copying them; no view of the array exists here
            self._data.resize(max(needed, len(self._data) * 3 // 2), refcheck=False)
        self._data[self._size : needed] = added
        self._size = needed

    def view(self) -> npt.NDArray[Any]:
        """Returns the values; no view may exist when the array grows."""
        return self._data[: self._size]

    def close(self) -> npt.NDArray[Any]:
        """Returns the values and frees the rest."""
        self._data.resize(self._size, refcheck=False)
        return self._data


class Origins:
    """``file:line`` of many documents in 8 bytes each."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._name_of = GrowingArray(np.int32)
        self._line_of = GrowingArray(np.int32)

    def append(self, origin: str) -> None:
        """Appends the origin of a document."""
        name = origin.rstrip("0123456789")  # ends in ":" or ":row "
        self._name_of.extend(self._names.setdefault(name, len(self._names)))
        self._line_of.extend(int(origin[len(name) :]))

    def at(self, i: int) -> str:
        """Returns ``file:line`` of document ``i``."""
        return f"{list(self._names)[self._name_of.view()[i]]}{self._line_of.view()[i]}"

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self._name_of.view().nbytes + self._line_of.view().nbytes
