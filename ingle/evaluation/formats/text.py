"""The text that formats are compared on: any data file, the first so many tokens of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ingle.config.data import Source
from ingle.data import IGNORE_INDEX, Example, Tokenizer, read_examples
from ingle.data.encoding import Document
from ingle.errors import DataError
from ingle.evaluation.run.windows import Window, cut_windows, draw_scored_document, window_size

#: Longest window; short ones give more of them, and so a narrower interval.
WINDOW = 512

#: Rows tokenized at once.
_ROWS = 64


def read_windows(path: str, model: Any, tokenizer: Tokenizer, num_tokens: int) -> list[Window]:
    """The beginning of a data file in windows, until about ``num_tokens`` tokens are to be scored.

    Of conversations and answers, what training would learn is scored; of plain text, everything.

    Args:
        path: A file, glob or hub dataset, read as ``data.sources`` is.
        model: Its window bounds what is read at once.
        tokenizer: The model's.
        num_tokens: How much is enough.

    Raises:
        DataError: The file cannot be read or is empty.
        EvaluationError: A row gives nothing to score.
    """
    windows: list[Window] = []
    found = number = 0
    size = min(WINDOW, window_size(model))
    for documents in _batches(read_examples([Source(path=path)]), tokenizer):
        for window in cut_windows(documents, tokenizer, size)[0]:
            if found >= num_tokens:
                return windows
            windows.append(Window(number + window.index, window.sample))
            found += count_scored(window)
        number += len(documents)
    if not windows:
        raise DataError("There is no text to compare formats on.", where=path, why="the file holds no rows")
    return windows


def count_scored(window: Window) -> int:
    """Tokens that are scored in a window."""
    return int(np.count_nonzero(window.sample.labels != IGNORE_INDEX))


def _batches(examples: Iterator[Example], tokenizer: Tokenizer) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for example in examples:
        batch.append(draw_scored_document(example, tokenizer))
        if len(batch) == _ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
