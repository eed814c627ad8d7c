"""Turns rows into arrays of tokens, and counts everything that is skipped, cut or unusual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data.dataset import FlatTokens, GrowingArray, Offsets, Origins, TextGroups
from ingle.data.duplicates import RowKeys
from ingle.data.encode_chat import ChatEncoder
from ingle.data.encode_pairs import PairEncoder
from ingle.data.encode_preferences import PreferenceEncoder
from ingle.data.encode_prompts import PromptEncoder
from ingle.data.encode_sources import SourceEncoder
from ingle.data.encode_tags import TagEncoder
from ingle.data.encode_text import TextPieces
from ingle.data.encode_windows import WindowEncoder
from ingle.data.row_encoder import Counts, Piece, RowEncoder, TokenOptions
from ingle.data.types import Example, Tokenizer


def make_encoder(tokenizer: Tokenizer, options: TokenOptions) -> RowEncoder:
    """Returns the encoder of the rows of an objective."""
    match options.objective:
        case "mlm" | "span":
            return TextPieces(tokenizer, options)
        case "classify":
            return PairEncoder(tokenizer, options)
        case "seq2seq":
            return SourceEncoder(tokenizer, options)
        case "tag":
            return TagEncoder(tokenizer, options)
        case "answer":
            return WindowEncoder(tokenizer, options)
        case "clm" | "sft":
            return ChatEncoder(tokenizer, options)
        case "reward" | "dpo" | "kto" | "orpo" | "simpo" | "cpo" | "bco":
            return PreferenceEncoder(tokenizer, options)
        case "ppo" | "grpo" | "rloo" | "reinforce" | "online_dpo" | "raft" | "distill":
            return PromptEncoder(tokenizer, options)


class RowTokenizer:
    """Tokenizes rows one batch after another, and keeps the tokens.

    The documents of a row are adjacent.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.
        with_keys: Whether to keep hashes of the rows for :class:`~ingle.data.ContaminationSearch`.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions, *, with_keys: bool = False) -> None:
        self._encoder, self._with_keys = make_encoder(tokenizer, options), with_keys
        self._start()

    def _start(self) -> None:
        self.counts = Counts()
        self._ids, self._supervised = GrowingArray(np.int32), GrowingArray(np.bool_)
        self._ends, self._origins = GrowingArray(np.int64), Origins()
        self._row_ends, self._name_of = GrowingArray(np.int64), GrowingArray(np.int16)
        self._names: dict[str, int] = {}
        self._token_columns: dict[str, GrowingArray] = {}
        self._document_columns: dict[str, GrowingArray] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._keys = RowKeys()

    def add(self, examples: Sequence[Example]) -> None:
        """Tokenizes rows.

        Raises:
            DataError: A row cannot be tokenized.
            ConfigError: An option does not suit the rows.
            ModelError: The chat template takes too much time or memory.
        """
        self.counts.rows += len(examples)
        if self._with_keys:
            self._keys.extend(examples)
        batch: list[tuple[Piece, str]] = []  # appended together, since each array takes a while
        for example, pieces in self._encoder.encode(examples, self.counts):
            batch += [(piece, example.origin) for piece in pieces]
            if pieces[0].name:
                self._name_of.extend([self._names.setdefault(p.name, len(self._names)) for p in pieces])
                self._row_ends.extend(self.counts.documents + len(batch))
        if batch:
            self._append(*zip(*batch, strict=True))

    def close(self) -> Tokenized:
        """Returns all rows so far, and starts again without rows."""
        token_columns = {name: column.close() for name, column in self._token_columns.items()}
        found = Tokenized(
            FlatTokens(
                self._ids.close(), self._supervised.close(), _as_offsets(self._ends), self._origins, token_columns
            ),
            self.counts,
            self._keys,
            TextGroups(_as_offsets(self._row_ends), tuple(self._names), self._name_of.close()) if self._names else None,
            {name: c.close().reshape(-1, *self._shapes[name]) for name, c in self._document_columns.items()},
        )
        self._start()
        return found

    def _append(self, pieces: Sequence[Piece], origins: Sequence[str]) -> None:
        ids, supervised = (np.concatenate(parts) for parts in list(zip(*pieces, strict=True))[:2])
        self._ids.extend(ids)
        self._supervised.extend(supervised)
        self._ends.extend(self.counts.tokens + np.cumsum([len(piece.ids) for piece in pieces], dtype=np.int64))
        self._origins.extend(origins)
        is_first = not self.counts.documents
        self.counts.documents += len(pieces)
        self.counts.tokens += len(ids)
        self.counts.supervised_tokens += int(np.count_nonzero(supervised))
        self._extend(self._token_columns, [piece.token_columns for piece in pieces], is_first)
        self._extend(self._document_columns, [piece.document_columns for piece in pieces], is_first)

    def _extend(
        self, columns: dict[str, GrowingArray], values: Sequence[Mapping[str, npt.ArrayLike]], is_first: bool
    ) -> None:
        """Appends the columns of documents; the first document decides on names, shapes and dtypes."""
        if is_first:
            for name, value in values[0].items():
                array = np.asarray(value)
                columns[name] = GrowingArray(array.dtype)
                if columns is self._document_columns:
                    self._shapes[name] = array.shape
        if not columns and not any(values):
            return
        assert all(columns.keys() == value.keys() for value in values), "all rows have the same columns"
        for name, column in columns.items():
            column.extend(np.concatenate([np.ravel(value[name]) for value in values]))


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Rows that were tokenized, see :class:`~ingle.data.TokenDataset`."""

    tokens: FlatTokens
    counts: Counts
    keys: RowKeys
    groups: TextGroups | None
    document_columns: Mapping[str, npt.NDArray[Any]]


def _as_offsets(ends: GrowingArray) -> Offsets:
    return np.concatenate([np.zeros(1, dtype=np.int64), ends.close()])
