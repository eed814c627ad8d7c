"""The special tokens that a tokenizer puts around one text or two, read from an example of its own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ingle.data.types import Ids, Mask, Tokenizer


class SpecialTokens(NamedTuple):
    """What stands before, between and after texts.

    Attributes:
        parts: Before the first text, between the texts (if there are two) and after the last one; int32 each.
        types: Token types of these parts and of the texts, in order; empty if the model has no token types.
    """

    parts: tuple[Ids, ...]
    types: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Number of special tokens."""
        return sum(map(len, self.parts))

    def wrap(self, *texts: Ids) -> tuple[Ids, Mapping[str, npt.NDArray[Any]], Mask]:
        """Returns the document of one text or two: its tokens, its columns, and which tokens are those of texts."""
        parts = [self.parts[0]]
        for text, after in zip(texts, self.parts[1:], strict=True):
            parts += [text, after]
        lengths = list(map(len, parts))
        columns = {}
        if self.types:
            columns["token_type_ids"] = np.repeat(np.array(self.types, np.int8), lengths)
        is_text = np.repeat(np.arange(len(parts)) % 2 == 1, lengths)
        return np.concatenate(parts).astype(np.int32, copy=False), columns, is_text


def read_special_tokens(tokenizer: Tokenizer, backend: Any, num_texts: int) -> SpecialTokens:
    """Reads the special tokens around one text or two.

    Args:
        tokenizer: The model's tokenizer.
        backend: Its backend, see :func:`~ingle.data.backend.copy_backend`.
        num_texts: 1 or 2.
    """
    encoding = backend.encode(*("a", "b")[:num_texts])
    has_types = "token_type_ids" in getattr(tokenizer, "model_input_names", ())
    return _split(encoding, num_texts, has_types=has_types)


def read_target_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Reads the special tokens around a target, which are others than those of a source in translation models.

    A target of a tokenizer that ends no text ends in the end-of-text token, so that the model learns to stop.
    """
    reader: Any = tokenizer  # a call with text_target alone is transformers' own
    found = _split(reader(text_target="a").encodings[0], 1, has_types=False)
    end = tokenizer.eos_token_id
    if end is None or any(end in part for part in found.parts):
        return found
    before, after = found.parts
    return SpecialTokens((before, np.append(after, end).astype(np.int32)), ())


def _split(encoding: Any, num_texts: int, *, has_types: bool) -> SpecialTokens:
    ids, types = np.array(encoding.ids, np.int32), encoding.type_ids
    places = [[i for i, text in enumerate(encoding.sequence_ids) if text == number] for number in range(num_texts)]
    borders = [0, *(border for place in places for border in (place[0], place[-1] + 1)), len(ids)]
    parts = tuple(ids[start:stop] for start, stop in zip(borders[::2], borders[1::2], strict=True))
    if not has_types:
        return SpecialTokens(parts, ())
    kinds = [types[start] if start < stop else 0 for start, stop in pairwise(borders)]
    return SpecialTokens(parts, tuple(kinds))
