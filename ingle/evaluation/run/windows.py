"""Documents whose tokens are scored, cut into windows that a model can read.

In an answer, exactly the tokens that ``sft`` supervises are scored: the answer and its end of turn, given the prompt,
with the same template and mask. So held-out perplexity is ``exp`` of the training loss on the same rows. In plain text,
every token is scored, including the first, which follows BOS or another token that starts a text.

A document that is too long for one window is cut into several; each begins with the last token of the one before, so
that every token is scored once.

Legend: T tokens of a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data import IGNORE_INDEX, ControlTokens, Example, Sample, Tokenizer
from ingle.data.encoding import Document, Encoded, TextEncoder, make_document
from ingle.data.types import Ids
from ingle.errors import EvaluationError

Mask = npt.NDArray[np.bool_]

#: Longest window in tokens; longer ones cost memory and change the scores little.
MAX_WINDOW = 2048

#: Tokens of one packed row.
ROW_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a document, which fits into the context of the model.

    Attributes:
        index: Index of the document.
        sample: Tokens of the window; those that are scored have labels.
    """

    index: int
    sample: Sample


def window_size(model: Any) -> int:
    """Returns the number of tokens in the longest window of a model."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(limit, MAX_WINDOW) if isinstance(limit, int) and limit > 1 else MAX_WINDOW


def draw_scored_document(
    example: Example, tokenizer: Tokenizer, system: str | None = None, control: ControlTokens | None = None
) -> Document:
    """Returns the document whose answer, or whose full text, is scored.

    Raises:
        EvaluationError: The row has no text to score.
        DataError: The chat template cannot be used.
    """
    document = make_document(example, tokenizer, train_on="last", system=system, control=control)
    if isinstance(document, str):
        raise EvaluationError("A task row has no text to score.", where=example.origin, why=document)
    return document


def cut_windows(documents: Sequence[Document], tokenizer: Tokenizer, size: int) -> tuple[list[Window], int]:
    """Returns windows of at most ``size`` tokens, and the number of prompts that were cut at the start.

    Raises:
        EvaluationError: A document has no token to score.
    """
    windows: list[Window] = []
    cut = 0
    for index, encoded in enumerate(TextEncoder(tokenizer).encode(documents)):
        pieces, was_cut = _windows(*_scored(encoded, documents[index], tokenizer), size, documents[index])
        windows += [Window(index, piece) for piece in pieces]
        cut += was_cut
    return windows, cut


def _scored(encoded: Encoded, document: Document, tokenizer: Tokenizer) -> tuple[Ids, Mask]:
    """Returns ids and which of them are scored; plain text gets a first token and loses its last one."""
    ids, scored = encoded.ids, encoded.supervised
    if document.answers is not None:
        return ids, scored
    if tokenizer.eos_token_id is not None:
        ids = ids[:-1]
    opening: int | None = tokenizer.bos_token_id
    if opening is None:
        opening = tokenizer.eos_token_id
    if opening is not None and (len(ids) == 0 or ids[0] != opening):
        ids = np.concatenate((np.array([opening], dtype=np.int32), ids))
    scored = np.ones(len(ids), dtype=np.bool_)
    scored[:1] = False
    return ids, scored


def _windows(ids_T: Ids, scored_T: Mask, size: int, document: Document) -> tuple[list[Sample], bool]:
    """Returns the windows of a document, and whether its prompt was cut at the start."""
    places = np.flatnonzero(scored_T)
    if not len(places):
        raise EvaluationError("The reference of a task row has no token to score.", where=document.origin)
    ids_T, scored_T = ids_T[: places[-1] + 1], scored_T[: places[-1] + 1]
    labels_T = np.where(scored_T, ids_T, IGNORE_INDEX).astype(np.int32)
    if len(ids_T) <= size:
        return [Sample(ids_T, labels_T)], False
    start, cut = 0, False
    if document.answers is not None:  # keep the prompt that leaves room for the answer, or for half a window
        start = max(len(ids_T) - size, 0) if len(ids_T) - places[0] < size else max(int(places[0]) - size // 2, 0)
        cut = start > 0
    pieces = []
    while start < len(ids_T) - 1:
        piece, labels = ids_T[start : start + size], labels_T[start : start + size].copy()
        labels[0] = IGNORE_INDEX  # scored by the window before, or part of the prompt
        pieces.append(Sample(piece, labels))
        start += size - 1
    return pieces, cut


def pack_windows(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Yields rows of windows of similar length, at most :data:`ROW_TOKENS` tokens unless one window is longer."""
    row: list[Window] = []
    num_tokens = 0
    for window in sorted(windows, key=lambda window: (len(window.sample.input_ids), window.index)):
        length = len(window.sample.input_ids)
        if row and num_tokens + length > ROW_TOKENS:
            yield row
            row, num_tokens = [], 0
        row.append(window)
        num_tokens += length
    if row:
        yield row
