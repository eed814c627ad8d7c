"""Copies a tokenizer's backend, with exact offsets and optionally with renamed control tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from ingle.data.types import Tokenizer
from ingle.errors import DataError


def copy_backend(tokenizer: Tokenizer, renamed: Mapping[str, str] | None = None) -> Any:
    """Copies the backend of a tokenizer; the copy reports exact offsets and neither pads nor truncates.

    ``trim_offsets`` excludes white space from the offsets of a token, which would hide where a token begins.

    Args:
        tokenizer: A fast tokenizer.
        renamed: New names of added tokens, by their old names. The copy reads the old names as plain text.

    Raises:
        DataError: The tokenizer is slow and reports no offsets, or its tokens cannot be renamed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            "The tokenizer does not report which characters a token covers.",
            why=f"{type(tokenizer).__name__} has no fast backend (tokenizer.json)",
            fix="use another tokenizer: --model.tokenizer=ID",
        )
    # Quotes inside a JSON string are escaped, so this text can only be the option itself.
    exact = backend.to_str().replace('"trim_offsets":true', '"trim_offsets":false')
    if renamed:
        exact = json.dumps(_rename(json.loads(exact), renamed))
    copy = tokenizers.Tokenizer.from_str(exact)
    copy.no_padding()
    copy.no_truncation()
    if renamed:
        before, after = backend.get_added_tokens_decoder(), copy.get_added_tokens_decoder()
        expected = {index: renamed.get(token.content, token.content) for index, token in before.items()}
        if {index: token.content for index, token in after.items()} != expected:
            raise DataError(
                "Control tokens inside messages cannot be read as text with this tokenizer.",
                why="the tokenizers library gives renamed control tokens different ids",
                fix="--data.control_tokens=keep, or another tokenizer: --model.tokenizer=ID",
            )
    return copy


def _rename(spec: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Renames added tokens in the content of a ``tokenizer.json``, also in its vocabulary."""
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    model = spec["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # Unigram: pieces and scores, ordered by id
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        merges = (tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in merges
            if left not in renamed and right not in renamed and left + right not in renamed
        ]
    return spec
