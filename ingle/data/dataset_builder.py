"""Builds a dataset in one pass over the sources, and counts everything that is skipped, cut or unusual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ingle.config.data import DataConfig, Source
from ingle.data.control import ControlTokens
from ingle.data.dataset import GrowingArray, Offsets, Origins, TextGroups, TokenDataset
from ingle.data.encoding import Document, Encoded, TextEncoder, make_document
from ingle.data.sandbox import Sandbox
from ingle.data.sources import read_examples
from ingle.data.template import TrainOn
from ingle.data.types import Example, RowParser, Tokenizer
from ingle.errors import ConfigError, DataError
from ingle.events import Progress, Sink, Warned
from ingle.report.data_results import DataStats, Remark, SourceShare
from ingle.wording import plural

#: Rows tokenized at once: at most this many, with at most about this many characters.
_BATCH_ROWS = 1024
_BATCH_CHARS = 1 << 21

_NO_LOSS = "No supervised token"
_PLAIN_TEXT = "Plain text has no answers: every token carries loss, as with objective clm."


def build_dataset(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    objective: Literal["clm", "sft"],
    sink: Sink | None = None,
    parse: RowParser | None = None,
    on_example: Callable[[Example], None] | None = None,
) -> TokenDataset:
    """Reads, renders, tokenizes and masks all sources.

    The documents of a row with several texts are adjacent and kept or dropped together.

    Args:
        data: Sources and options.
        tokenizer: The model's tokenizer.
        objective: ``clm``: every token carries loss; ``sft``: the tokens that ``data.train_on`` names.
        sink: Receives ``Progress``, and ``Warned`` for everything that was skipped, cut or unusual.
        parse: Reads rows; by default they are read in the layout of their source.
        on_example: Called with every row, for example to search for duplicates in the same pass.

    Raises:
        DataError: A row is malformed, a template cannot be masked, or no document is left.
        ConfigError: ``too_long: split`` with conversations.
        HubUnavailable: A hub dataset cannot be reached.
    """
    builder = _DatasetBuilder(data, tokenizer, objective, sink or (lambda _: None))
    return builder.build(parse, on_example or (lambda _: None))


class _Tally:
    """Counts rows by reason and remembers the first of each."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, origin: str) -> None:
        count, first = self._counts.get(reason, (0, origin))
        self._counts[reason] = (count + 1, first)

    def close(self) -> tuple[Remark, ...]:
        return tuple(Remark(reason, *found) for reason, found in self._counts.items())


class _DatasetBuilder:
    def __init__(self, data: DataConfig, tokenizer: Tokenizer, objective: Literal["clm", "sft"], sink: Sink) -> None:
        self.data, self.tokenizer, self.objective, self.sink = data, tokenizer, objective, sink
        self.train_on: TrainOn = "all" if objective == "clm" else data.train_on
        self.too_long = data.too_long
        if self.too_long == "auto":
            self.too_long = "split" if objective == "clm" else "truncate"
        self.control = ControlTokens(tokenizer, data.control_tokens)
        self.encoder = TextEncoder(tokenizer, self.control)
        self.sandbox = Sandbox(tokenizer)
        self.ids, self.supervised = GrowingArray(np.int32), GrowingArray(np.bool_)
        self.ends, self.origins = GrowingArray(np.int64), Origins()
        self.row_ends, self.name_of, self.names = GrowingArray(np.int64), GrowingArray(np.int16), dict[str, int]()
        self.token_columns: dict[str, GrowingArray] = {}
        self.document_columns: dict[str, GrowingArray] = {}
        self.dropped, self.remarks, self.control_tokens = _Tally(), _Tally(), _Tally()
        self.rows = self.documents = self.tokens = self.supervised_tokens = 0
        self.truncated = self.truncated_tokens = self.split = self.cut_ends = self.open_turns = 0

    def build(self, parse: RowParser | None, on_example: Callable[[Example], None]) -> TokenDataset:
        shares = []
        for source in self.data.sources:
            before = self._totals()
            for examples in self._batches(source, parse, on_example):
                rows = list(self._make_documents(examples))
                encoded = self.encoder.encode([document for _, documents in rows for document in documents])
                for example, documents in rows:
                    self._add(example, documents, [next(encoded) for _ in documents])
                self.sink(Progress("Tokenizing rows", self.rows))
            shares.append(SourceShare(source.path, *(b - a for a, b in zip(before, self._totals(), strict=True))))
        stats = self._close(tuple(shares))
        return TokenDataset(
            self.ids.close(),
            self.supervised.close(),
            _as_offsets(self.ends),
            self.origins,
            stats,
            TextGroups(_as_offsets(self.row_ends), tuple(self.names), self.name_of.close()) if self.names else None,
            {name: column.close() for name, column in self.token_columns.items()},
            {name: column.close() for name, column in self.document_columns.items()},
        )

    def _totals(self) -> tuple[int, int, int, int]:
        return self.rows, self.documents, self.tokens, self.supervised_tokens

    def _batches(
        self, source: Source, parse: RowParser | None, on_example: Callable[[Example], None]
    ) -> Iterator[list[Example]]:
        batch: list[Example] = []
        chars = 0
        for example in read_examples([source], parse=parse, on_warning=lambda message: self.sink(Warned(message))):
            self.rows += 1
            on_example(example)
            batch.append(example)
            chars += _count_chars(example)
            if len(batch) == _BATCH_ROWS or chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _make_documents(self, examples: Sequence[Example]) -> Iterator[tuple[Example, list[Document]]]:
        """Yields the documents of each row that is not skipped."""
        with self.sandbox:
            for example in examples:
                documents = []
                for text in example.texts.values() or (example,):
                    document = make_document(
                        text,
                        self.tokenizer,
                        train_on=self.train_on,
                        system=self.data.system,
                        control=self.control,
                        sandbox=self.sandbox,
                    )
                    if isinstance(document, str):
                        self.dropped.add(document, example.origin)
                        break
                    documents.append(document)
                else:
                    if example.text is not None and self.objective == "sft":
                        self.remarks.add(_PLAIN_TEXT, example.origin)
                    yield example, documents

    def _add(self, example: Example, documents: Sequence[Document], encoded: Sequence[Encoded]) -> None:
        """Adds the documents of a row, unless one of them is dropped."""
        parts = []
        for document, each in zip(documents, encoded, strict=True):
            self._remark(document, each)
            pieces = self._cut(example, document, each)
            if isinstance(pieces, str):
                self.dropped.add(pieces, example.origin)
                return
            parts.append(pieces)
        texts = tuple(example.texts.items()) or (("", example),)
        for (name, text), each, pieces in zip(texts, encoded, parts, strict=True):
            self._count_cuts(each, pieces)
            for piece in pieces:
                self._append(example, text, each, piece)
                if example.texts:
                    self.name_of.extend(self.names.setdefault(name, len(self.names)))
        if example.texts:
            self.row_ends.extend(self.documents)

    def _remark(self, document: Document, encoded: Encoded) -> None:
        for remark in (*document.remarks, *encoded.remarks):
            self.remarks.add(remark, document.origin)
        for token in document.control:
            self.control_tokens.add(token, document.origin)
        self.open_turns += encoded.open_turns

    def _cut(self, example: Example, document: Document, encoded: Encoded) -> list[slice] | str:
        """Returns the pieces of a document that fit ``max_seq_len``, or the reason to skip its row."""
        limit, length = self.data.max_seq_len, len(encoded.ids)
        within = ""
        if length <= limit:
            pieces = [slice(0, length)]
        elif self.too_long == "drop":
            return f"Longer than data.max_seq_len = {limit}."
        elif self.too_long == "split":
            if example.texts or not document.everything:
                raise ConfigError(
                    "Only plain text can be split into several documents.",
                    where=f"data.too_long = split, {document.origin}",
                    why=f"{length} tokens, data.max_seq_len = {limit}",
                    fix="--data.too_long=truncate or --data.too_long=drop",
                )
            # Pieces overlap by one token, so that every token but the first is predicted exactly once.
            pieces = [slice(start, start + limit) for start in range(0, length - 1, limit - 1)]
        else:
            pieces, within = [slice(0, limit)], f" within data.max_seq_len = {limit}"
        if not example.labels and not any(encoded.supervised[piece].any() for piece in pieces):
            return f"{_NO_LOSS}{within}."
        return pieces

    def _count_cuts(self, encoded: Encoded, pieces: Sequence[slice]) -> None:
        self.split += len(pieces) > 1
        lost = len(encoded.ids) - pieces[-1].stop
        if lost > 0:
            self.truncated += 1
            self.truncated_tokens += lost
            self.cut_ends += bool(encoded.supervised[pieces[-1].stop :].any())

    def _append(self, row: Example, text: Example, encoded: Encoded, piece: slice) -> None:
        ids, supervised = encoded.ids[piece], encoded.supervised[piece]
        if piece.start:  # the previous piece predicts the token that both pieces contain
            supervised = supervised.copy()
            supervised[0] = False
        self.ids.extend(ids)
        self.supervised.extend(supervised)
        self.documents += 1
        self.tokens += len(ids)
        self.supervised_tokens += int(np.count_nonzero(supervised))
        self.ends.extend(self.tokens)
        self.origins.append(row.origin)
        if row.labels or text.labels:
            numbers = {k: v for k, v in {**row.labels, **text.labels}.items() if not isinstance(v, tuple)}
            _extend(self.document_columns, numbers, np.float64, self.documents == 1)
            tokens = {name: labels[piece] for name, labels in encoded.token_labels.items()}
            _extend(self.token_columns, tokens, np.int32, self.documents == 1)

    def _close(self, sources: tuple[SourceShare, ...]) -> DataStats:
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
            dropped=self.dropped.close(),
            remarks=self.remarks.close(),
            control_tokens=self.control_tokens.close(),
            sources=sources,
        )
        if not self.documents:
            reasons = (f"{plural(r.count, 'row')} skipped, first {r.first}: {r.reason}" for r in stats.dropped)
            raise DataError(
                "The training data has no document with a supervised token.",
                where="data.sources: " + ", ".join(source.path for source in self.data.sources),
                why=" ".join(reasons).removesuffix(".") or "no rows",
                fix="`ingle data inspect CONFIG` shows why rows are skipped",
            )
        self._warn(stats)
        return stats

    def _warn(self, stats: DataStats) -> None:
        for remark in stats.dropped:
            self.sink(Warned(f"Rows skipped: {remark.reason}", remark.first, remark.count))
        for remark in stats.remarks:
            self.sink(Warned(remark.reason, remark.first, remark.count))
        where = "data.max_seq_len"
        if stats.truncated_documents:
            lost = plural(stats.truncated_tokens, "token")
            cut = f"Documents were truncated to data.max_seq_len = {self.data.max_seq_len}; {lost} lost."
            self.sink(Warned(cut, where, stats.truncated_documents))
        if stats.cut_ends:
            self.sink(Warned("Truncated answers have no end-of-turn token.", where, stats.cut_ends))
        if stats.open_turns:
            why = "." if self.encoder.has_eos else "; the tokenizer has no end-of-text token."
            self.sink(Warned(f"Trained turns have no end-of-turn token{why}", count=stats.open_turns))


def _as_offsets(ends: GrowingArray) -> Offsets:
    return np.concatenate([np.zeros(1, dtype=np.int64), ends.close()])


def _extend(
    columns: dict[str, GrowingArray], values: Mapping[str, npt.ArrayLike], dtype: npt.DTypeLike, is_first: bool
) -> None:
    """Appends the labels of a document; the first document decides on the names."""
    if is_first:
        columns.update({name: GrowingArray(dtype) for name in values})
    assert columns.keys() == values.keys(), "all rows have the same labels"
    for name, value in values.items():
        columns[name].extend(value)


def _count_chars(example: Example) -> int:
    if example.texts:
        return sum(map(_count_chars, example.texts.values()))
    if example.messages:
        return sum(len(message.content) for message in example.messages)
    return len(example.text or "") + len(example.prompt or "") + len(example.completion or "")
