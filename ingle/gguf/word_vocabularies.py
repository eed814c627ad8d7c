"""Converts WordPiece and unigram vocabularies, which encoders and encoder-decoders have.

WordPiece marks the pieces that continue a word (``##s``); llama.cpp marks those that begin one, as sentencepiece does.
Its pre-tokenizer is that of BERT, always in lower case unless the file says otherwise. Unigram vocabularies have a
score for each token and a table that normalizes characters, which both programs read alike.

Source: llama.cpp's ``src/llama-vocab.cpp`` and ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.pretokenizers import SPACE
from ingle.gguf.special_tokens import (
    CONTROL,
    ENCODER_SPECIAL,
    MISSING,
    NORMAL,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    added_tokens,
    bad_value,
    read_scores,
    template,
)

_CONTINUES = "##"
_LOWERCASE, _ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
_CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def read_wordpiece(
    metadata: Mapping[str, Any], vocab: Mapping[str, int], types: Sequence[int], special: dict[str, str]
) -> dict[str, Any]:
    """Returns the content of a ``tokenizer.json``.

    Args:
        metadata: Of the file.
        vocab: Its tokens, as the file writes them.
        types: Their types.
        special: Special tokens by name; gets ``cls_token`` if the file only has ``bos_token``.

    Raises:
        GgufError: The file does not have the tokens around a text.
    """
    if "bos_token" in special:
        special.setdefault("cls_token", special["bos_token"])
    first, last = special.get("cls_token"), special.get("sep_token")
    if first is None or last is None:
        raise bad_value("tokenizer.ggml.cls_token_id or tokenizer.ggml.seperator_token_id", "is missing")
    kept = {token: number for token, number in vocab.items() if types[number] in (CONTROL, UNKNOWN)}
    kept |= {token: vocab[token] for token in special.values() if token in vocab}
    lowercase = bool(metadata.get(_LOWERCASE, True))
    return _tokenizer(
        added_tokens(kept, [CONTROL] * len(types)),
        template([first], [last], vocab, types=(0, 1)),
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": bool(metadata.get(_ACCENTS, lowercase)),
            "lowercase": lowercase,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": _CONTINUES, "cleanup": True},
        model={
            "type": "WordPiece",
            "unk_token": special.get("unk_token", "[UNK]"),
            "continuing_subword_prefix": _CONTINUES,
            "max_input_chars_per_word": 100,
            "vocab": {token if token in kept else _to_wordpiece(token): number for token, number in vocab.items()},
        },
    )


def _wordpiece(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
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


def _from_wordpiece(token: str) -> str:
    """Returns a token that is not special as llama.cpp writes it."""
    return token.removeprefix(_CONTINUES) if token.startswith(_CONTINUES) else f"{SPACE}{token}"


def _to_wordpiece(token: str) -> str:
    return token.removeprefix(SPACE) if token.startswith(SPACE) else f"{_CONTINUES}{token}"


def read_unigram(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], special: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the content of a ``tokenizer.json``; arguments as in :func:`read_wordpiece`.

    Raises:
        GgufError: The file does not have a score for each token.
    """
    scores = read_scores(metadata, len(types))
    vocab = {token: number for number, token in enumerate(tokens)}
    ends = [special["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token", True) else []
    starts = [special["bos_token"]] if metadata.get("tokenizer.ggml.add_bos_token", False) else []
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
    return _tokenizer(
        added_tokens(vocab, types),
        template(starts, ends, vocab, types=(0, 0)),
        normalizer={"type": "Sequence", "normalizers": steps} if steps else None,
        pre_tokenizer=cuts,
        decoder=decoder,
        model={
            "type": "Unigram",
            "unk_id": vocab.get(special.get("unk_token", "")),
            "vocab": [list(pair) for pair in zip(tokens, map(float, scores), strict=True)],
            "byte_fallback": False,
        },
    )


def write_words(tokenizer: Mapping[str, Any], vocab_size: int, special: Mapping[str, str | None]) -> dict[str, Any]:
    """Returns the metadata of a WordPiece or unigram tokenizer; arguments as in ``to_metadata`` of its caller.

    Raises:
        GgufError: llama.cpp splits text in another way.
    """
    is_wordpiece = tokenizer["model"]["type"] == "WordPiece"
    entries = tokenizer["model"]["vocab"]
    vocab = entries if is_wordpiece else {token: number for number, (token, _) in enumerate(entries)}
    added = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    unknown = special.get("unk_token")
    tokens = [MISSING.format(number) for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in (vocab | added).items():
        if number < vocab_size:
            tokens[number] = _from_wordpiece(token) if is_wordpiece and token not in added else token
            types[number] = UNKNOWN if token == unknown else CONTROL if token in added else NORMAL
    values = _wordpiece(tokenizer) if is_wordpiece else _unigram(tokenizer, vocab_size)
    values |= {"ggml.pre": "default", "ggml.tokens": tokens, "ggml.token_type": types}
    ids = {token: number for token, number in (vocab | added).items() if number < vocab_size}
    for key, name in (SPECIAL | ENCODER_SPECIAL).items():
        text = special.get(name)
        if text is not None and text in ids:
            values[f"ggml.{key}_token_id"] = ids[text]
    if is_wordpiece:
        values["ggml.token_type_count"] = 2
        values.setdefault("ggml.bos_token_id", values["ggml.cls_token_id"])  # llama.cpp begins texts with it
    else:
        values |= {"ggml.add_bos_token": False, "ggml.add_eos_token": True}
    return {f"tokenizer.{key}": value for key, value in values.items()}


def _unigram(tokenizer: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
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


def _tokenizer(added: list[dict[str, Any]], post_processor: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = {"version": "1.0", "truncation": None, "padding": None}
    return empty | {"added_tokens": added, "post_processor": post_processor} | parts


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
