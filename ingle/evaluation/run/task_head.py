"""What a model predicts for rows: labels, numbers, tags and answers of a task head, and fills of masks.

Rows are read in parts, so memory is bounded however many rows there are. The rows of a part are packed by length,
without padding.

Legend: N tokens of a packed row, W words of a text, C outputs of the head, M masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from ingle.config.objective import Answer, Classify, ObjectiveConfig, Tag
from ingle.data import Example, Sample
from ingle.data.batch import collate
from ingle.data.dataset_builder import describe_cuts
from ingle.data.encode_windows import find_null
from ingle.data.row_encoder import Counts, Piece, RowEncoder, TokenOptions, row_options
from ingle.data.row_tokenizer import make_encoder
from ingle.data.types import IGNORE_INDEX
from ingle.data.worker import batches
from ingle.errors import DataError
from ingle.evaluation.decoding.answers import AnswerWindow, FoundAnswer, find_answers
from ingle.evaluation.decoding.classes import decode_classes
from ingle.evaluation.decoding.masks import Fill, find_fills
from ingle.evaluation.decoding.tags import decode_tags
from ingle.evaluation.run.packed_logits import document_logits, pack_documents
from ingle.evaluation.scorers import Prediction, Problem
from ingle.evaluation.statistics import Floats
from ingle.events import Sink
from ingle.models import forward_hidden, forward_task, through_head
from ingle.parallel import compute_device

#: Called with the number of further rows that are finished.
OnRows = Callable[[int], None]


def _ignore(reported: object) -> None:
    pass


@dataclass(frozen=True)
class TaskHead:
    """A model, and how its rows are read.

    Its methods report to ``on_rows`` how many further rows are finished, and to ``sink`` what was cut.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        objective: What it was trained for, with the names of all labels.
        max_seq_len: Longest document in tokens.
    """

    model: Any
    tokenizer: Any
    objective: ObjectiveConfig
    max_seq_len: int

    @cached_property
    def options(self) -> TokenOptions:
        """How rows become tokens."""
        return row_options(self.objective, self.max_seq_len)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, or tags; empty for numbers."""
        return self.options.labels

    @property
    def problem(self) -> Problem:
        """What is predicted."""
        return self.options.problem

    def predict(
        self, examples: Iterable[Example], on_rows: OnRows = _ignore, sink: Sink = _ignore
    ) -> Iterator[Prediction]:
        """Yields the labels or tags of each row; tags are those of its words.

        Raises:
            DataError: A row has no text.
        """
        assert isinstance(self.objective, Classify | Tag)
        for rows, pieces, logits in self._run(examples, on_rows, sink):
            if isinstance(self.objective, Classify):
                yield from decode_classes(np.stack([each[0] for each in logits]), self.label_names, self.problem)
            else:
                for row, parts, outputs in zip(rows, pieces, logits, strict=True):
                    yield decode_tags(self._at_words(row, parts, outputs), self.label_names)

    def find_answers(
        self,
        examples: Iterable[Example],
        on_rows: OnRows = _ignore,
        sink: Sink = _ignore,
        *,
        num_best: int = 1,
        can_be_empty: bool = False,
    ) -> Iterator[list[FoundAnswer]]:
        """Yields the best answers to each question, the best first; none of them is empty unless they may be.

        Raises:
            DataError: A question or context has no text, or the question leaves no room for the context.
        """
        assert isinstance(self.objective, Answer)
        cls = getattr(self.tokenizer, "cls_token_id", None)
        for rows, pieces, logits in self._run(examples, on_rows, sink):
            for row, parts, outputs in zip(rows, pieces, logits, strict=True):
                yield find_answers(
                    row.texts["context"].text or "",
                    [AnswerWindow(_spans(part), find_null(part.ids, cls)) for part in parts],
                    outputs,
                    max_answer_tokens=self.objective.max_answer_tokens,
                    num_best=num_best,
                    can_be_empty=can_be_empty,
                )

    def fill(
        self, examples: Iterable[Example], top: int, on_rows: OnRows = _ignore, sink: Sink = _ignore
    ) -> Iterator[list[list[Fill]]]:
        """Yields the most likely tokens at each mask of each text.

        Raises:
            DataError: A text has no mask.
        """
        mask, vocab_size = self.tokenizer.mask_token_id, len(self.tokenizer)
        for rows, pieces in self.read(examples, sink):
            for row, parts in zip(rows, pieces, strict=True):
                if not any((part.ids == mask).any() for part in parts):
                    raise DataError(
                        "The text has no mask to fill.",
                        where=row.origin,
                        fix=f"write {self.tokenizer.mask_token} in place of a word",
                    )
            masked = [[part for part in parts if (part.ids == mask).any()] for parts in pieces]
            documents = [as_sample(part) for parts in masked for part in parts]
            fills = iter(self._fill_documents(documents, mask, top, vocab_size))
            for parts in masked:
                yield [each for _ in parts for each in next(fills)]
            on_rows(len(rows))

    @torch.no_grad()
    def _fill_documents(
        self, documents: Sequence[Sample], mask: int, top: int, vocab_size: int
    ) -> list[list[list[Fill]]]:
        """Returns the most likely tokens at each mask of each document; keeps the logits of one packed row only."""
        found: list[list[list[Fill]]] = [[] for _ in documents]
        for row in pack_documents(documents):
            batch = collate([documents[index] for index in row]).to(self._device())
            places = torch.nonzero(batch.input_ids[0] == mask)[:, 0]
            hidden_MH = forward_hidden(self.model, batch)[0, places]
            logits_MV = through_head(self.model, lambda output, hidden: output.logits(hidden), hidden_MH)
            counts = [int((documents[index].input_ids == mask).sum()) for index in row]
            for index, each in zip(row, logits_MV.double().cpu().split(counts), strict=True):
                found[index] = find_fills(each.numpy(), top, vocab_size)
        return found

    def read(
        self, examples: Iterable[Example], sink: Sink = _ignore
    ) -> Iterator[tuple[Sequence[Example], list[Sequence[Piece]]]]:
        """Yields the rows of each part and their documents, without labels; warns at the end if texts were cut.

        Raises:
            DataError: A row cannot be read.
        """
        encoder, counts = make_encoder(self.tokenizer, self.options), Counts()
        for rows in batches(examples):
            yield rows, _encode_rows(encoder, rows, counts)
        if counts.truncated_documents:
            sink(describe_cuts(counts, self.max_seq_len))

    def _run(
        self, examples: Iterable[Example], on_rows: OnRows, sink: Sink
    ) -> Iterator[tuple[Sequence[Example], list[Sequence[Piece]], list[list[Floats]]]]:
        """Yields the rows of each part, their documents, and the logits of the head for these."""
        forward = partial(forward_task, self.model)
        for rows, pieces in self.read(examples, sink):
            documents = [as_sample(piece) for parts in pieces for piece in parts]
            found = iter(document_logits(forward, documents, self._device()))
            yield rows, pieces, [[next(found) for _ in parts] for parts in pieces]
            on_rows(len(rows))

    def _at_words(self, row: Example, pieces: Sequence[Piece], logits: Sequence[Floats]) -> Floats:
        """Returns the logits at the first token of each word, [W, C]; NaN for a word without a token."""
        logits_WC = np.full((len(row.words), len(self.label_names)), np.nan)
        number = {start: word for word, (start, end) in enumerate(row.words) if start < end}
        for piece, logits_TC in zip(pieces, logits, strict=True):
            spans_T2 = _spans(piece)
            places = np.flatnonzero(spans_T2[:, 0] >= 0)
            logits_WC[[number[start] for start in spans_T2[places, 0].tolist()]] = logits_TC[places]
        return logits_WC

    def _device(self) -> torch.device:
        return compute_device(next(self.model.parameters()))


def _encode_rows(encoder: RowEncoder, rows: Sequence[Example], counts: Counts) -> list[Sequence[Piece]]:
    """Returns the documents of each row, without its label.

    Raises:
        DataError: The encoder skips a row.
    """
    unlabelled = [replace(row, label=None) for row in rows]
    found = {id(row): pieces for row, pieces in encoder.encode(unlabelled, counts)}
    for row in unlabelled:
        if id(row) not in found:
            reasons = [reason for reason, (_, first) in counts.dropped.items() if first == row.origin]
            raise DataError("The row cannot be predicted.", where=row.origin, why=" ".join(reasons).rstrip("."))
    return [found[id(row)] for row in unlabelled]


def as_sample(piece: Piece) -> Sample:
    """Returns a document without its labels."""
    columns = {name: column for name, column in piece.token_columns.items() if name != "token_labels"}
    return Sample(piece.ids, np.full(len(piece.ids), IGNORE_INDEX, np.int32), columns)


def _spans(piece: Piece) -> Any:
    assert piece.spans is not None
    return piece.spans
