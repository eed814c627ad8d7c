"""Converts WordPiece and unigram vocabularies, which encoders and encoder-decoders have.

WordPiece marks the pieces that continue a word (``##s``); llama.cpp marks those that begin one, as sentencepiece does.
Its pre-tokenizer is that of BERT, always in lower case unless the file says otherwise. Unigram vocabularies have a
score for each token and a table that normalizes characters, which both programs read alike.

Source: llama.cpp's ``src/llama-vocab.cpp`` and ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.pretokenizers import SPACE

_CONTINUES = "##"
_LOWERCASE, _ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
_CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def read_wordpiece(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], special: Collection[str], unknown: str
) -> dict[str, Any]:
    """Returns the parts of a ``tokenizer.json``.

    Args:
        metadata: Of the file.
        vocab: Its tokens, as the file writes them.
        special: Tokens that are written as they are.
        unknown: The token of a word that no tokens form.
    """
    words = {token if token in special else _to_wordpiece(token): number for token, number in vocab.items()}
    lowercase = bool(metadata.get(_LOWERCASE, True))
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": bool(metadata.get(_ACCENTS, lowercase)),
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": _CONTINUES, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": _CONTINUES,
            "max_input_chars_per_word": 100,
            "vocab": words,
        },
    }


def write_wordpiece(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a WordPiece tokenizer, without its tokens.

    Raises:
        GgufError: It splits text in another way than BERT.
    """
    normalizer, cuts = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    kinds = (normalizer.get("type"), cuts.get("type"), tokenizer["model"]["continuing_subword_prefix"])
    if kinds != ("BertNormalizer", "BertPreTokenizer", _CONTINUES) or not normalizer["clean_text"]:
        raise _unsupported(tokenizer, "WordPiece")
    lowercase = bool(normalizer["lowercase"])
    accents = lowercase if normalizer["strip_accents"] is None else bool(normalizer["strip_accents"])
    return {"ggml.model": "bert", "ggml.normalizer.lowercase": lowercase, "ggml.normalizer.strip_accents": accents}


def from_wordpiece(token: str) -> str:
    """Returns a token that is not special as llama.cpp writes it."""
    return token.removeprefix(_CONTINUES) if token.startswith(_CONTINUES) else f"{SPACE}{token}"


def _to_wordpiece(token: str) -> str:
    return token.removeprefix(SPACE) if token.startswith(SPACE) else f"{_CONTINUES}{token}"


def read_unigram(
    metadata: Mapping[str, Any], tokens: Sequence[str], scores: Sequence[float], unknown: int | None
) -> dict[str, Any]:
    """Returns the parts of a ``tokenizer.json``.

    Args:
        metadata: Of the file.
        tokens: Its tokens.
        scores: Of each token.
        unknown: Number of the token for characters without one.
    """
    table = metadata.get(_CHARSMAP)
    steps: list[dict[str, Any]] = []
    if table is not None:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(table)).decode()})
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        steps.append(_SPACES)
    prefix = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    cuts: dict[str, Any] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix, "split": True}
    decoder = dict(cuts)
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        cuts = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, cuts]}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": cuts,
        "decoder": decoder,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [list(pair) for pair in zip(tokens, map(float, scores), strict=True)],
            "byte_fallback": False,
        },
    }


def write_unigram(tokenizer: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Returns the metadata of a unigram tokenizer, with the scores of its tokens.

    Raises:
        GgufError: It normalizes or splits text in another way than sentencepiece.
    """
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    cuts = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    tables = [step["precompiled_charsmap"] for step in normalizers if step["type"] == "Precompiled"]
    metaspace = [step for step in cuts if step["type"] == "Metaspace"]
    others = {step["type"] for step in normalizers} - {"Precompiled", "Replace", "Strip"}
    others |= {step["type"] for step in cuts} - {"Metaspace", "WhitespaceSplit"}
    if others or len(tables) > 1 or len(metaspace) != 1:
        raise _unsupported(tokenizer, "unigram")
    scores = [float(score) for _, score in tokenizer["model"]["vocab"]][:vocab_size]
    values: dict[str, Any] = {
        "ggml.model": "t5",
        "ggml.scores": scores + [0.0] * (vocab_size - len(scores)),
        "ggml.add_space_prefix": metaspace[0].get("prepend_scheme", "always") != "never",
        "ggml.remove_extra_whitespaces": len(cuts) > 1 or any(step["type"] == "Replace" for step in normalizers),
    }
    if tables:
        values["ggml.precompiled_charsmap"] = base64.b64decode(tables[0])
    return values


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _unsupported(tokenizer: Mapping[str, Any], kind: str) -> GgufError:
    return GgufError(
        f"llama.cpp splits text in another way than this {kind} tokenizer.",
        where="tokenizer.json",
        why=json.dumps({key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer")})[:300],
    )
