"""Rows of ``tag``: words and their tags, aligned with tokens and cut into overlapping windows.

Only the first token of a word carries its tag. A long text becomes several documents, which begin at words; each word
is labelled in the one document where it has most context.

Source: Devlin et al. 2019, "BERT" (arXiv 1810.04805), section 5.3, for first tokens; google-research/bert,
``run_squad.py``, ``_check_is_max_context``, for the choice of the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ingle.data.backend import copy_backend
from ingle.data.label_names import LabelEncoder
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.special_tokens import read_special_tokens
from ingle.data.types import IGNORE_INDEX, Example, Tokenizer
from ingle.errors import DataError

Places = npt.NDArray[np.int64]

_NO_TOKEN = "A word has no token (such as a zero-width space), so its tag carries no loss."


class TagEncoder:
    """Tokenizes words and encodes their tags.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens, with the names of the tags.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        self._options = options
        self._backend = copy_backend(tokenizer)
        self._special = read_special_tokens(tokenizer, self._backend, 1)
        self._labels = LabelEncoder(options)
        self._room = options.max_seq_len - self._special.num_tokens

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the documents of each row that is kept; see :class:`~ingle.data.row_encoder.RowEncoder`.

        The supervised tokens of the documents of a row are the first tokens of its words, in order; ``spans`` of a
        document has the characters of these words.
        """
        encodings = self._backend.encode_batch([example.text or "" for example in examples], add_special_tokens=False)
        for example, encoding in zip(examples, encodings, strict=True):
            labels = self._encode_tags(example)
            ids = np.array(encoding.ids, np.int32)
            words = np.array(example.words, np.int64).reshape(-1, 2)
            first = find_first_tokens(np.array(encoding.offsets, np.int64).reshape(-1, 2), words)
            if not (first >= 0).any():
                counts.dropped.add("No words.", example.origin)
                continue
            if (first < 0).any():
                counts.remarks.add(_NO_TOKEN, example.origin)
            if len(ids) > self._room and self._options.too_long == "drop":
                counts.dropped.add(f"Longer than data.max_seq_len = {self._options.max_seq_len}.", example.origin)
                continue
            windows, window_of = cut_windows(first, len(ids), self._room, self._options.stride)
            counts.split_documents += len(windows) > 1
            pieces = []
            for number, (start, stop) in enumerate(windows):
                own = np.flatnonzero(window_of == number)
                pieces.append(self._make_piece(ids[start:stop], first[own] - start, labels[own], words[own]))
            yield example, pieces

    def _encode_tags(self, example: Example) -> npt.NDArray[np.int32]:
        if example.label is None and not self._options.with_labels:
            return np.full(len(example.words), IGNORE_INDEX, np.int32)
        if not isinstance(example.label, tuple):
            raise DataError(
                "The row has no tags.",
                where=example.origin,
                fix="name their column with data.sources: columns: {tags: ...}",
            )
        return np.array([self._labels.find(str(tag), example.origin) for tag in example.label], np.int32)

    def _make_piece(
        self, ids: npt.NDArray[np.int32], places: Places, labels: npt.NDArray[np.int32], words: Places
    ) -> Piece:
        document, columns = self._special.wrap(ids)
        places = places + len(self._special.parts[0])
        token_labels = np.full(len(document), IGNORE_INDEX, np.int32)
        token_labels[places] = labels
        supervised = np.zeros(len(document), np.bool_)
        supervised[places] = True
        spans = np.full((len(document), 2), -1, np.int32)
        spans[places] = words
        return Piece(document, supervised, "", {**columns, "token_labels": token_labels}, spans=spans)


def find_first_tokens(offsets: Places, words: Places) -> Places:
    """Returns the first token of each word, int64 [W]; -1 for a word without a token of its own.

    A token belongs to the first word that it overlaps.

    Args:
        offsets: Characters of tokens, ascending, [T, 2]; they may include white space before a word.
        words: Characters of words, ascending, [W, 2].
    """
    if not len(offsets):
        return np.full(len(words), -1)
    found = np.searchsorted(np.maximum.accumulate(offsets[:, 1]), words[:, 0], side="right")
    inside = found < len(offsets)
    found = np.where(inside, found, 0)
    inside &= (offsets[found, 0] < words[:, 1]) & (words[:, 0] < words[:, 1])
    found = np.where(inside, found, -1)
    repeated = np.zeros(len(found), np.bool_)
    kept = np.flatnonzero(inside)
    repeated[kept[1:]] = found[kept[1:]] == found[kept[:-1]]
    return np.where(repeated, -1, found)


def cut_windows(first: Places, num_tokens: int, room: int, stride: int) -> tuple[list[tuple[int, int]], Places]:
    """Cuts a text into windows that begin at words.

    Args:
        first: First token of each word, [W]; -1 without a token.
        num_tokens: Tokens of the text.
        room: Longest window.
        stride: Tokens that neighbours share, at least.

    Returns:
        The windows from and to (exclusive), and the window of each word, [W]: the one where the shorter of its contexts
        is longest, or the first of several; -1 without a token.
    """
    if num_tokens <= room:
        return [(0, num_tokens)], np.where(first < 0, -1, 0)
    stride = min(stride, room // 2)
    starts = np.unique(first[first >= 0])
    windows = []
    start = 0
    while start + room < num_tokens:
        windows.append((start, start + room))
        later = starts[(starts > start) & (starts <= start + room - stride)]
        start = int(later[-1]) if len(later) else start + room - stride
    windows.append((start, num_tokens))
    context = np.stack([np.minimum(first - start, stop - 1 - first) for start, stop in windows])
    return windows, np.where(first < 0, -1, context.argmax(0))
