"""Reads the beginning of a data file as windows of scored tokens."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from ingle.config.data import Source
from ingle.data import IGNORE_INDEX, Tokenizer, read_examples
from ingle.errors import DataError
from ingle.evaluation.run.windows import Window, cut_windows, draw_scored_document, window_size

#: Longest window in tokens. Shorter windows give more of them, which narrows the intervals.
MAX_WINDOW = 512

#: Rows tokenized at once.
_NUM_ROWS = 64


def read_windows(path: str, model: Any, tokenizer: Tokenizer, num_tokens: int) -> list[Window]:
    """Reads windows from the beginning of a data file until they contain about ``num_tokens`` scored tokens.

    In conversations and answers, the tokens that training would supervise are scored; in plain text, all tokens.

    Args:
        path: A file, glob or hub dataset, read like ``data.sources``.
        model: Its context length limits the windows.
        tokenizer: Tokenizer of the model.
        num_tokens: Number of scored tokens.

    Raises:
        DataError: The file cannot be read or is empty.
        EvaluationError: A row has no token to score.
    """
    windows: list[Window] = []
    num_scored = num_documents = 0
    max_size = min(MAX_WINDOW, window_size(model))
    documents = (draw_scored_document(example, tokenizer) for example in read_examples([Source(path=path)]))
    for batch in iter(lambda: list(islice(documents, _NUM_ROWS)), []):
        for window in cut_windows(batch, tokenizer, max_size)[0]:
            if num_scored >= num_tokens:
                return windows
            windows.append(Window(num_documents + window.index, window.sample))
            num_scored += count_scored(window)
        num_documents += len(batch)
    if not windows:
        raise DataError("There is no text to compare formats on.", where=path, why="the file contains no rows")
    return windows


def count_scored(window: Window) -> int:
    """Returns the number of scored tokens in a window."""
    return int(np.count_nonzero(window.sample.labels != IGNORE_INDEX))
