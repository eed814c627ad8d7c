"""The tokenized dataset: flat arrays, built in one pass over the sources.

All documents lie one after the other in one int32 array, with one bool a token for the loss mask and one
int64 offset a document: 5 bytes a token and about 20 a document, whatever the sources look like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ingle.config.data import DataConfig, Source
from ingle.data.control import ControlTokens
from ingle.data.encoding import Document, Encoded, TextEncoder, draw_document
from ingle.data.sources import read_examples
from ingle.data.statistics import DataStats, SourceShare, Tally
from ingle.data.template import TrainOn
from ingle.data.types import IGNORE_INDEX, Ids, Mask, Sample, Tokenizer
from ingle.errors import ConfigError, DataError
from ingle.events import Progress, Sink, Warned
from ingle.wording import plural

#: Documents tokenized at once: at most so many, and at most about so many characters.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARS = 1 << 21

_NO_LOSS = "no supervised token"
_STRADDLED = "a token lies across the border of prompt and answer and carries no loss (end the prompt with white space)"
_RECUT = (
    "the white space at the prompt's end becomes other tokens when nothing follows it, as in other servers "
    "(a single line end is safer)"
)
_PLAIN_TEXT = "plain text has no answers: every token carries loss (objective clm says the same)"
_AS_TEXT = "control tokens inside messages are read as text (data.control_tokens=keep makes them tokens)"
_AS_TOKENS = "control tokens inside messages are kept as tokens, which may open or close turns (data.control_tokens)"
_END_LEFT_OUT = "the answer ends in an end-of-turn token of its own, which is left out: there is one already"


class TokenDataset:
    """Tokenized documents.

    Attributes:
        lengths: int64 [D], tokens of each document.
        stats: What became of the rows.
    """

    def __init__(self, ids: Ids, supervised: Mask, offsets: npt.NDArray[np.int64], origins: Origins, stats: DataStats):
        assert len(ids) == len(supervised) == offsets[-1], "arrays do not fit together"
        self._ids, self._supervised, self._offsets, self._origins = ids, supervised, offsets, origins
        self.lengths: npt.NDArray[np.int64] = np.diff(offsets)
        self.stats = stats

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def sample(self, i: int) -> Sample:
        """Document ``i``."""
        part = slice(self._offsets[i], self._offsets[i + 1])
        ids = self._ids[part]
        return Sample(ids, np.where(self._supervised[part], ids, np.int32(IGNORE_INDEX)))

    def origin(self, i: int) -> str:
        """``file:line`` of document ``i``."""
        return self._origins.at(i)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._ids)

    @property
    def largest_id(self) -> int:
        """The largest token of all documents."""
        return int(self._ids.max())

    @property
    def nbytes(self) -> int:
        """Memory the arrays take, in bytes."""
        return sum(a.nbytes for a in (self._ids, self._supervised, self._offsets, self.lengths)) + self._origins.nbytes

    def closing_ids(self) -> Ids:
        """int32 [D], the last token of each document that carries loss: what the model learns to stop with."""
        places = np.where(self._supervised, np.arange(len(self._ids)), 0)
        last: Ids = self._ids[np.maximum.reduceat(places, self._offsets[:-1])]
        return last

    def fingerprint(self) -> str:
        """SHA-256 over ids, mask and borders: equal exactly when training sees the same documents."""
        digest = hashlib.sha256()
        for array in (self._offsets, self._ids, self._supervised):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Origins:
    """``file:line`` of many documents in 8 bytes each."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._name_of = _Column(np.int32)
        self._line_of = _Column(np.int32)

    def append(self, origin: str, count: int = 1) -> None:
        """Note where the next ``count`` documents come from."""
        name = origin.rstrip("0123456789")  # ends in ":" or ":row "
        number = self._names.setdefault(name, len(self._names))
        self._name_of.extend(np.full(count, number, dtype=np.int32))
        self._line_of.extend(np.full(count, int(origin[len(name) :]), dtype=np.int32))

    def at(self, i: int) -> str:
        """``file:line`` of document ``i``."""
        return f"{list(self._names)[self._name_of.view()[i]]}{self._line_of.view()[i]}"

    @property
    def nbytes(self) -> int:
        """Memory it takes, in bytes."""
        return self._name_of.view().nbytes + self._line_of.view().nbytes


class _Column:
    """An array that grows in place, so that the peak is not twice the size."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._data: npt.NDArray[Any] = np.empty(1024, dtype=dtype)
        self._size = 0

    def extend(self, values: npt.NDArray[Any]) -> None:
        needed = self._size + len(values)
        if needed > len(self._data):
            # realloc moves pages instead of copying them; no view of the array is alive here
            self._data.resize(max(needed, len(self._data) * 3 // 2), refcheck=False)
        self._data[self._size : needed] = values
        self._size = needed

    def view(self) -> npt.NDArray[Any]:
        return self._data[: self._size]

    def close(self) -> npt.NDArray[Any]:
        self._data.resize(self._size, refcheck=False)
        return self._data


def build_dataset(
    data: DataConfig, tokenizer: Tokenizer, *, objective: Literal["clm", "sft"], sink: Sink | None = None
) -> TokenDataset:
    """Read, render, tokenize and mask all sources.

    Args:
        data: What to read and how.
        tokenizer: Of the model.
        objective: ``clm`` lets every token carry loss; ``sft`` those ``data.train_on`` names.
        sink: Gets ``Progress`` while it works and ``Warned`` for all that was skipped, cut or odd.

    Raises:
        DataError: A row is malformed, a template cannot be masked, or nothing is left to learn from.
        ConfigError: ``too_long: split`` with conversations.
        HubUnavailable: A hub dataset cannot be reached.
    """
    return _Build(data, tokenizer, objective, sink or (lambda _: None)).run()


class _Build:
    """One pass over the sources and the counts it makes."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, objective: Literal["clm", "sft"], sink: Sink) -> None:
        self.data, self.tokenizer, self.objective, self.sink = data, tokenizer, objective, sink
        self.train_on: TrainOn = "all" if objective == "clm" else data.train_on
        self.too_long = data.too_long
        if self.too_long == "auto":
            self.too_long = "split" if objective == "clm" else "truncate"
        self.control = ControlTokens(tokenizer, data.control_tokens)
        self.encoder = TextEncoder(tokenizer, self.control)
        self.ids, self.supervised = _Column(np.int32), _Column(np.bool_)
        self.ends, self.origins = _Column(np.int64), Origins()
        self.dropped, self.remarks, self.control_tokens = Tally(), Tally(), Tally()
        self.rows = self.documents = self.tokens = self.supervised_tokens = 0
        self.truncated = self.truncated_tokens = self.split = self.cut_ends = self.open_turns = 0

    def run(self) -> TokenDataset:
        shares = []
        for source in self.data.sources:
            before = (self.rows, self.documents, self.tokens, self.supervised_tokens)
            for batch in self._draw(source):
                for document, encoded in zip(batch, self.encoder.encode(batch), strict=True):
                    self._add(document, encoded)
                self.sink(Progress("tokenize", self.rows))
            now = (self.rows, self.documents, self.tokens, self.supervised_tokens)
            shares.append(SourceShare(source.path, *(b - a for a, b in zip(before, now, strict=True))))
        stats = self._close(tuple(shares))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), self.ends.close()])
        return TokenDataset(self.ids.close(), self.supervised.close(), offsets, self.origins, stats)

    def _draw(self, source: Source) -> Iterator[list[Document]]:
        batch: list[Document] = []
        chars = 0
        for example in read_examples([source], on_warning=lambda message: self.sink(Warned(message))):
            self.rows += 1
            drawn = draw_document(
                example, self.tokenizer, train_on=self.train_on, system=self.data.system, control=self.control
            )
            if isinstance(drawn, str):
                self.dropped.add(drawn, example.origin)
                continue
            if example.text is not None and self.objective == "sft":
                self.remarks.add(_PLAIN_TEXT, example.origin)
            batch.append(drawn)
            chars += len(drawn.text)
            if len(batch) == _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _add(self, document: Document, encoded: Encoded) -> None:
        limit, length = self.data.max_seq_len, len(encoded.ids)
        for remark in document.remarks:
            self.remarks.add(remark, document.origin)
        if document.control:
            self.remarks.add(_AS_TEXT if document.shielded is not None else _AS_TOKENS, document.origin)
            for token in document.control:
                self.control_tokens.add(token, document.origin)
        if document.ends_left_out:
            self.remarks.add(_END_LEFT_OUT, document.origin)
        if encoded.straddled:
            self.remarks.add(_STRADDLED, document.origin)
        if encoded.recut:
            self.remarks.add(_RECUT, document.origin)
        self.open_turns += encoded.open_turns
        if length <= limit:
            self._append(document, encoded.ids, encoded.supervised)
        elif self.too_long == "drop":
            self.dropped.add(f"longer than data.max_seq_len = {limit}", document.origin)
        elif self.too_long == "split":
            self._append_pieces(document, encoded)
        elif self._append(document, encoded.ids[:limit], encoded.supervised[:limit], truncated=True):
            self.truncated += 1
            self.truncated_tokens += length - limit
            self.cut_ends += bool(encoded.supervised[limit:].any())

    def _append_pieces(self, document: Document, encoded: Encoded) -> None:
        """Pieces overlap by one token, so that every token but the first is predicted exactly once."""
        if not document.everything:
            raise ConfigError(
                "A conversation cannot be split into several documents.",
                where=f"data.too_long = split, {document.origin}",
                why=f"{len(encoded.ids)} tokens, data.max_seq_len = {self.data.max_seq_len}",
                fix="data.too_long=truncate or data.too_long=drop",
            )
        self.split += 1
        limit = self.data.max_seq_len
        for start in range(0, len(encoded.ids) - 1, limit - 1):
            supervised = encoded.supervised[start : start + limit].copy()
            supervised[0] = False
            self._append(document, encoded.ids[start : start + limit], supervised)

    def _append(self, document: Document, ids: Ids, supervised: Mask, *, truncated: bool = False) -> bool:
        count = int(np.count_nonzero(supervised))
        if count == 0:
            reason = f"{_NO_LOSS} within data.max_seq_len = {self.data.max_seq_len}" if truncated else _NO_LOSS
            self.dropped.add(reason, document.origin)
            return False
        self.ids.extend(ids)
        self.supervised.extend(supervised)
        self.documents += 1
        self.tokens += len(ids)
        self.supervised_tokens += count
        self.ends.extend(np.array([self.tokens], dtype=np.int64))
        self.origins.append(document.origin)
        return True

    def _close(self, sources: tuple[SourceShare, ...]) -> DataStats:
        dropped, remarks = self.dropped.close(), self.remarks.close()
        stats = DataStats(
            rows=self.rows,
            documents=self.documents,
            tokens=self.tokens,
            supervised_tokens=self.supervised_tokens,
            truncated_documents=self.truncated,
            truncated_tokens=self.truncated_tokens,
            split_documents=self.split,
            cut_ends=self.cut_ends,
            open_turns=self.open_turns,
            dropped=dropped,
            remarks=remarks,
            control_tokens=self.control_tokens.close(),
            sources=sources,
        )
        if not self.documents:
            raise DataError(
                "Nothing is left to learn from.",
                where="data.sources: " + ", ".join(source.path for source in self.data.sources),
                why="; ".join(f"{plural(r.count, 'row')}: {r.reason} (first {r.first})" for r in dropped) or "no rows",
                fix="`ingle data inspect CONFIG` shows what became of the rows",
            )
        self._warn(stats)
        return stats

    def _warn(self, stats: DataStats) -> None:
        for remark in stats.dropped:
            self.sink(Warned(f"Rows skipped: {remark.reason}", remark.first, remark.count))
        for remark in stats.remarks:
            self.sink(Warned(remark.reason, remark.first, remark.count))
        if stats.truncated_documents:
            lost = f"documents cut to data.max_seq_len = {self.data.max_seq_len}: "
            lost += f"{plural(stats.truncated_tokens, 'token')} lost"
            self.sink(Warned(lost, "data.max_seq_len", stats.truncated_documents))
        if stats.cut_ends:
            self.sink(
                Warned("Answers that were cut have lost their end-of-turn token", "data.max_seq_len", stats.cut_ends)
            )
        if stats.open_turns:
            why = "" if self.encoder.has_eos else "; the tokenizer has no end-of-text token"
            self.sink(Warned(f"Trained turns have no end-of-turn token to learn{why}", count=stats.open_turns))
