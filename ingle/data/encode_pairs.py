"""Rows of ``classify``: one text or a pair of texts as one document, and its label.

A pair that is too long is cut as the tokenizers library cuts it (``longest_first``), so that a pipeline of
transformers reads the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ingle.data.backend import copy_backend
from ingle.data.label_names import LabelEncoder
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.special_tokens import read_special_tokens
from ingle.data.types import Example, Ids, Tokenizer
from ingle.errors import ConfigError

_NOTHING_BETWEEN = "The tokenizer puts nothing between the two texts of a pair, so the model may not tell them apart."


class PairEncoder:
    """Tokenizes texts and pairs of texts, and encodes their labels.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens, with the names of the labels.

    Raises:
        ConfigError: ``too_long: split``.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        if options.too_long == "split":
            raise ConfigError(
                "A text with a label cannot be split into several documents.",
                where="data.too_long = split",
                fix="--data.too_long=truncate or --data.too_long=drop",
            )
        self._options = options
        self._backend = copy_backend(tokenizer)
        self._special = [read_special_tokens(tokenizer, self._backend, count) for count in (1, 2)]
        self._labels = LabelEncoder(options)

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the document of each row that is kept; see :class:`~ingle.data.row_encoder.RowEncoder`."""
        rows = [_texts_of(example) for example in examples]
        flat = [text for texts in rows for text in texts]
        encodings = iter(self._backend.encode_batch_fast(flat, add_special_tokens=False))
        for example, texts in zip(examples, rows, strict=True):
            ids = [np.array(next(encodings).ids, np.int32) for _ in texts]
            label = self._labels.encode(example)
            if not any(map(len, ids)) or not any(text.strip() for text in texts):
                counts.dropped.add("Empty text.", example.origin)
                continue
            special = self._special[len(ids) - 1]
            if len(ids) == 2 and not len(special.parts[1]):
                counts.remarks.add(_NOTHING_BETWEEN, example.origin)
            room = self._options.max_seq_len - special.num_tokens
            lost = sum(map(len, ids)) - room
            if lost > 0 and self._options.too_long == "drop":
                counts.dropped.add(f"Longer than data.max_seq_len = {self._options.max_seq_len}.", example.origin)
                continue
            counts.truncated_documents += lost > 0
            counts.truncated_tokens += max(lost, 0)
            document, columns = special.wrap(*_shorten(ids, room))
            labels: dict[str, Any] = {"document_labels": label}
            yield example, [Piece(document, np.zeros(len(document), np.bool_), "", columns, labels)]


def _texts_of(example: Example) -> list[str]:
    if example.texts:
        return [text.text or "" for text in example.texts.values()]
    return [example.text or ""]


def _shorten(ids: Sequence[Ids], room: int) -> list[Ids]:
    """Cuts the longer of two texts first, and both in half where each is longer than that."""
    if len(ids) == 1:
        return [ids[0][:room]]
    short, long = sorted(map(len, ids))
    if short + long > room:
        long = max(short, room - short)
        if short + long > room:
            short, long = room // 2, room - room // 2
    first_is_longer = len(ids[0]) > len(ids[1])
    sizes = (long, short) if first_is_longer else (short, long)
    return [text[:size] for text, size in zip(ids, sizes, strict=True)]
