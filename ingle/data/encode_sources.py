"""Rows of ``seq2seq``: a source and a target, which are two adjacent documents of one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ingle.data.backend import copy_backend
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.special_tokens import SpecialTokens, read_special_tokens, read_target_tokens
from ingle.data.types import Example, Ids, Tokenizer
from ingle.errors import DataError


class SourceEncoder:
    """Tokenizes sources and targets, each with the special tokens that the tokenizer gives it.

    A source that is cut keeps its special tokens, which encoders expect. A target that is cut loses its end, so that
    the model does not learn to stop there.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.

    Raises:
        ConfigError: ``too_long: split``.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        options.refuse_split("A source with its target")
        self._options = options
        self._backend = copy_backend(tokenizer)
        self._source = read_special_tokens(tokenizer, self._backend, 1)._replace(types=())
        self._target = read_target_tokens(tokenizer)

    def encode(self, examples: Sequence[Example], counts: Counts) -> Iterator[tuple[Example, Sequence[Piece]]]:
        """Yields source and target of each row that is kept; see :class:`~ingle.data.row_encoder.RowEncoder`.

        Raises:
            DataError: A row has no source and target.
        """
        texts = [text for example in examples for text in self._read(example)]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        options = self._options
        for example in examples:
            source, target = (np.array(next(encodings).ids, np.int32) for _ in range(2))
            if not len(source) or not len(target):
                counts.dropped.add("Empty target." if len(source) else "Empty source.", example.origin)
                continue
            lost_source = len(source) + self._source.num_tokens - options.max_seq_len
            lost_target = len(target) + self._target.num_tokens - options.max_target_len
            if max(lost_source, lost_target) > 0 and options.too_long == "drop":
                limit = "max_seq_len" if lost_source > 0 else "max_target_len"
                counts.dropped.add(f"Longer than data.{limit} = {getattr(options, limit)}.", example.origin)
                continue
            counts.truncated_documents += (lost_source > 0) + (lost_target > 0)
            counts.truncated_tokens += max(lost_source, 0) + max(lost_target, 0)
            counts.cut_ends += lost_target > 0
            source = _wrap(self._source, source[: options.max_seq_len - self._source.num_tokens])
            target = _wrap(self._target, target)[: options.max_target_len]
            yield (
                example,
                (
                    Piece(source, np.zeros(len(source), np.bool_), "source"),
                    Piece(target, np.ones(len(target), np.bool_), "target"),
                ),
            )

    def _read(self, example: Example) -> tuple[str, str]:
        if example.prompt is None or example.completion is None:
            raise DataError(
                "The row has no source and target.",
                where=example.origin,
                why="it is a conversation" if example.messages else "it is plain text",
                fix="name them with data.sources: columns: {source: ..., target: ...}",
            )
        return self._options.prefix + example.prompt, example.completion


def source_ids(tokenizer: Tokenizer, texts: Sequence[str], prefix: str = "") -> list[list[int]]:
    """Returns what an encoder reads of texts, as in training.

    Args:
        tokenizer: The model's tokenizer.
        texts: The sources.
        prefix: Text before every source.
    """
    backend = copy_backend(tokenizer)
    special = read_special_tokens(tokenizer, backend, 1)._replace(types=())
    encodings = backend.encode_batch_fast([prefix + text for text in texts], add_special_tokens=False)
    return [_wrap(special, np.array(encoding.ids, np.int32)).tolist() for encoding in encodings]


def _wrap(special: SpecialTokens, ids: Ids) -> Ids:
    return special.wrap(ids)[0]
