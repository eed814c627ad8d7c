"""Rows of ``answer``: a question with overlapping windows of its context, each a document of its own.

A window that does not contain the whole answer teaches that there is none: its answer is the first (CLS) token.

Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), sections 4.2 and 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data.backend import copy_backend
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.special_tokens import read_special_tokens
from ingle.data.types import IGNORE_INDEX, Example, Ids, Span, Tokenizer
from ingle.errors import DataError

_NO_ROOM = "The question leaves no room for the context within data.max_seq_len."
_IN_NO_WINDOW = "No window contains the whole answer, so the row teaches that there is none (data.max_seq_len)."


class WindowEncoder:
    """Tokenizes questions with their contexts, and finds the tokens of answers.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        self._options = options
        self._backend = copy_backend(tokenizer)
        self._special = read_special_tokens(tokenizer, self._backend, 2)
        self._cls = getattr(tokenizer, "cls_token_id", None)

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the windows of each row that is kept; see :class:`~ingle.data.row_encoder.RowEncoder`.

        ``start_labels`` and ``end_labels`` count from the first token of the document; ``IGNORE_INDEX`` in rows to
        predict. ``spans`` has the characters of the tokens of the context.
        """
        questions = self._backend.encode_batch_fast(
            [(example.texts["question"].text or "").strip() for example in examples], add_special_tokens=False
        )
        contexts = self._backend.encode_batch(
            [example.texts["context"].text or "" for example in examples], add_special_tokens=False
        )
        for example, asked, found in zip(examples, questions, contexts, strict=True):
            question, context = np.array(asked.ids, np.int32), np.array(found.ids, np.int32)
            spans = _strip(np.array(found.offsets, np.int32).reshape(-1, 2), example.texts["context"].text or "")
            answer = self._find_answer(example, spans)
            room = self._options.max_seq_len - self._special.num_tokens - len(question)
            if room < 1 or not len(context) or not len(question):
                counts.dropped.add(_NO_ROOM if room < 1 else "Empty question or context.", example.origin)
                continue
            if len(context) > room and self._options.too_long == "drop":
                counts.dropped.add(f"Longer than data.max_seq_len = {self._options.max_seq_len}.", example.origin)
                continue
            windows = _cut(len(context), room, self._options.stride)
            counts.split_documents += len(windows) > 1
            if answer and not any(start <= answer[0] and answer[1] < stop for start, stop in windows):
                counts.remarks.add(_IN_NO_WINDOW, example.origin)
            yield example, [self._make_piece(example, question, context, spans, window, answer) for window in windows]

    def _find_answer(self, example: Example, spans: npt.NDArray[np.int32]) -> tuple[int, int] | None:
        """Returns the first and the last token of the first answer; None if there is none."""
        if example.label is None and self._options.with_labels:
            raise DataError(
                "The row has no answers.",
                where=example.origin,
                why="a question without an answer has an empty list of answers",
                fix="name their column with data.sources: columns: {answers: ...}",
            )
        if not example.label:
            return None
        answer = example.label[0]
        assert isinstance(answer, Span), "answers are places"
        overlap = np.flatnonzero((spans[:, 0] < answer.end) & (spans[:, 1] > answer.start))
        return (int(overlap[0]), int(overlap[-1])) if len(overlap) else None

    def _make_piece(
        self,
        example: Example,
        question: Ids,
        context: Ids,
        spans: npt.NDArray[np.int32],
        window: tuple[int, int],
        answer: tuple[int, int] | None,
    ) -> Piece:
        start, stop = window
        document, columns, _ = self._special.wrap(question, context[start:stop])
        shift = len(self._special.parts[0]) + len(question) + len(self._special.parts[1])
        places = np.full((len(document), 2), -1, np.int32)
        places[shift : shift + stop - start] = spans[start:stop]
        null = find_null(document, self._cls)
        first, last = null, null
        if example.label is None:
            first, last = IGNORE_INDEX, IGNORE_INDEX
        elif answer and start <= answer[0] and answer[1] < stop:
            first, last = answer[0] - start + shift, answer[1] - start + shift
        labels: dict[str, Any] = {"start_labels": np.int32(first), "end_labels": np.int32(last)}
        return Piece(document, np.zeros(len(document), np.bool_), "", columns, labels, places)


def find_null(document: Ids, cls: int | None) -> int:
    """Returns the place of the token that means that there is no answer: CLS, or the first token without one."""
    return 0 if cls is None else int(np.argmax(document == cls))


def _cut(num_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Returns windows from and to (exclusive), of which neighbours share ``stride`` tokens."""
    step = room - min(stride, room // 2)
    last = -(-max(num_tokens - room, 0) // step)
    return [(i * step, min(i * step + room, num_tokens)) for i in range(last + 1)]


def _strip(offsets: npt.NDArray[np.int32], text: str) -> npt.NDArray[np.int32]:
    """Returns the characters of tokens without the white space that they begin with."""
    stripped = offsets.copy()
    is_space = np.array([char.isspace() for char in text] + [False])
    while (space := (stripped[:, 0] < stripped[:, 1]) & is_space[stripped[:, 0]]).any():
        stripped[space, 0] += 1
    return stripped
