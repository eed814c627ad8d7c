"""Rows of ``mlm`` and ``span``: plain text, cut into documents that do not overlap.

Documents of ``mlm`` have the tokenizer's special tokens. Those of ``span`` have none, since corruption decides what
begins and ends a source and a target. They are as long as sources of ``max_seq_len`` tokens allow: T5 makes 512 tokens
of 568.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ingle.data.backend import copy_backend
from ingle.data.corruption import is_special
from ingle.data.encoding import PIECE_CHARS, cut_text
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.special_tokens import read_special_tokens
from ingle.data.types import Example, Ids, Tokenizer


class TextPieces:
    """Tokenizes text of any layout; tokens that may be predicted are supervised.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        self._options = options
        self._backend = copy_backend(tokenizer)
        self._special = read_special_tokens(tokenizer, self._backend, 1)._replace(types=())
        self._is_special = is_special(tokenizer)
        self._room = options.max_text_len or options.max_seq_len - self._special.num_tokens

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields the documents of each row that is kept; see :class:`~ingle.data.row_encoder.RowEncoder`."""
        texts = list(map(read_text, examples))
        short = [text for text in texts if len(text) <= PIECE_CHARS]
        encodings = iter(self._backend.encode_batch_fast(short, add_special_tokens=False))
        for example, text in zip(examples, texts, strict=True):
            ids = self._encode_long(text) if len(text) > PIECE_CHARS else np.array(next(encodings).ids, np.int32)
            if not text.strip() or not len(ids):
                counts.dropped.add("Empty text.", example.origin)
                continue
            if len(ids) > self._room and self._options.too_long == "drop":
                counts.dropped.add(f"Longer than data.max_seq_len = {self._options.max_seq_len}.", example.origin)
                continue
            parts = [ids[start : start + self._room] for start in range(0, len(ids), self._room)]
            if self._options.too_long == "truncate":
                counts.truncated_documents += len(parts) > 1
                counts.truncated_tokens += sum(map(len, parts[1:]))
                parts = parts[:1]
            counts.split_documents += len(parts) > 1
            yield example, [self._make_piece(part) for part in parts]

    def _encode_long(self, text: str) -> Ids:
        parts = (self._backend.encode_batch_fast([part], add_special_tokens=False)[0].ids for part in cut_text(text))
        return np.concatenate([np.array(part, np.int32) for part in parts])

    def _make_piece(self, ids: Ids) -> Piece:
        if self._options.objective == "mlm":
            ids, _, _ = self._special.wrap(ids)
        return Piece(ids, ~self._is_special[ids])


def read_text(example: Example) -> str:
    """Returns the text of a row of any layout: its messages, texts, or prompt and completion, one after another."""
    if example.text is not None:
        return example.text
    if example.prompt is not None:
        return example.prompt + (example.completion or "")
    if example.texts:
        return "\n".join(map(read_text, example.texts.values()))
    return "\n".join(message.content for message in example.messages)
