"""Private copies of a tokenizer's backend: exact positions, and control tokens under other names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from ingle.data.types import Tokenizer
from ingle.errors import DataError


def copy_backend(tokenizer: Tokenizer, renamed: Mapping[str, str] | None = None) -> Any:
    """A copy of the tokenizer that reports the exact characters of each token, and neither pads nor truncates.

    ``trim_offsets`` leaves white space out of a token's span, which would hide where a token begins.

    Args:
        tokenizer: Of the fast kind.
        renamed: New contents of added tokens.  In the copy only the new content makes the token; the former one is
            text like any other.

    Raises:
        DataError: The tokenizer is of the slow kind, which cannot tell positions.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            "The tokenizer cannot tell which characters a token stands for.",
            why=f"{type(tokenizer).__name__} has no fast backend (tokenizer.json)",
            fix="name another tokenizer with model.tokenizer=",
        )
    # Quotes inside a JSON string are escaped, so this text is the option itself wherever it stands.
    exact = backend.to_str().replace('"trim_offsets":true', '"trim_offsets":false')
    if renamed:
        exact = json.dumps(_rename(json.loads(exact), renamed))
    copy = tokenizers.Tokenizer.from_str(exact)
    copy.no_padding()
    copy.no_truncation()
    if renamed:
        before, after = backend.get_added_tokens_decoder(), copy.get_added_tokens_decoder()
        expected = {index: renamed.get(token.content, token.content) for index, token in before.items()}
        assert {index: token.content for index, token in after.items()} == expected, "renaming has changed ids"
    return copy


def _rename(spec: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """``tokenizer.json`` with other contents of added tokens, also where the model's vocabulary holds them."""
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    model = spec["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # Unigram: pieces and their scores, in order of their ids
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
