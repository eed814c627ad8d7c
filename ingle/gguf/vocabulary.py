"""Converts the tokenizer of a GGUF file to the content of a ``tokenizer.json`` and back.

``gpt2`` is byte-level BPE: the file has the merges and the name of the pre-tokenizer. ``llama`` is sentencepiece: the
file has a score for every token and no merges. llama.cpp always joins the pair whose token has the best score, so
merges in the order of scores are equivalent. ``gemma4`` is sentencepiece with merges; it is only read, because
llama.cpp computes the same with scores. ``bert`` is WordPiece and ``t5`` is unigram
(:mod:`ingle.gguf.word_vocabularies`).

Source: llama.cpp's ``src/llama-vocab.cpp`` and ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ingle.errors import GgufError
from ingle.gguf.pretokenizers import (
    ADDS_BOS,
    BYTE_LEVEL_DECODER,
    IGNORES_MERGES,
    SPACE,
    add_space_prefix,
    byte_level,
    find_pre,
    sentencepiece,
)
from ingle.gguf.special_tokens import (
    BYTE,
    CONTROL,
    DEFAULTS,
    ENCODER_SPECIAL,
    FIX,
    MISSING,
    NORMAL,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    added_tokens,
    bad_value,
    read_scores,
    special_token_id,
    template,
)
from ingle.gguf.word_vocabularies import read_unigram, read_wordpiece, write_words

_KINDS = {
    "gpt2": "byte-level BPE",
    "llama": "sentencepiece",
    "gemma4": "sentencepiece with merges",
    "bert": "WordPiece",
    "t5": "unigram",
}

#: Tokens that end an answer in llama.cpp regardless of the metadata.
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
)

#: Metadata of the tokens that encoders have around a text.
_CLS, _SEP = "tokenizer.ggml.cls_token_id", "tokenizer.ggml.seperator_token_id"

#: Sentencepiece tokens are split at every position, so the work grows with the square of their length.
_MAX_TOKEN_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as transformers needs it.

    Attributes:
        tokenizer: The content of a ``tokenizer.json``.
        special: The special tokens that the file defines: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``.
        chat_template: Jinja template, or None.
        end_token_ids: Tokens that end an answer, the end-of-text token first.
        input_names: What the tokenizer returns; None for transformers' default.
    """

    tokenizer: dict[str, Any]
    special: dict[str, str]
    chat_template: str | None
    end_token_ids: list[int]
    input_names: list[str] | None = None


def to_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Returns the tokenizer that GGUF metadata describe.

    Raises:
        GgufError: There is no tokenizer, its kind is not supported, or its parts contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    if kind not in _KINDS or not tokens:
        raise GgufError(
            "The file contains no tokenizer." if not tokens else f"Tokenizers of kind {kind!r} are not supported.",
            where="tokenizer.ggml.model",
            why=f"supported are {', '.join(f'{name} ({what})' for name, what in _KINDS.items())}",
            fix=FIX,
        )
    longest = max(map(len, tokens))
    if longest > _MAX_TOKEN_CHARS:
        raise bad_value("tokenizer.ggml.tokens", f"contains a token of {longest:,} characters")
    types: Any = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise bad_value("tokenizer.ggml.token_type", f"does not have a type for each of the {len(tokens):,} tokens")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind != "gpt2" or pre in ADDS_BOS)
    chat_template = metadata.get("tokenizer.chat_template")
    if not isinstance(pre, str) or not isinstance(chat_template, str | None):
        raise bad_value("tokenizer.ggml.pre or tokenizer.chat_template", "is not a string")
    special = _special_tokens(metadata, kind, tokens)
    real = {
        token: number
        for number, (token, type_) in enumerate(zip(tokens, types, strict=True))
        if not (type_ == UNUSED and token == MISSING.format(number))
    }
    if kind == "gpt2":
        parts = _byte_level(metadata, real, pre)
        if metadata.get("tokenizer.ggml.add_eos_token", False) and "cls_token" in special:
            own = {key: token for key, token in special.items() if key not in ("bos_token", "eos_token")}
            around = template([own["cls_token"]], [own["sep_token"]], real, types=(0, 0))
            core = _core(added_tokens(real, types), around, parts)
            return Vocabulary(core, own, None, [], ["input_ids", "attention_mask"])
    elif kind == "gemma4":
        parts = _sentencepiece_with_merges(metadata, real, special.get("unk_token"))
    elif kind == "bert":
        own = {key: token for key, token in special.items() if key not in ("bos_token", "eos_token")}
        return Vocabulary(read_wordpiece(metadata, real, types, special), own, None, [])
    elif kind == "t5":
        core, ends = read_unigram(metadata, tokens, types, special), _end_token_ids(metadata, real, types)
        return Vocabulary(core, special, None, ends, ["input_ids", "attention_mask"])
    else:
        parts = _sentencepiece(metadata, real, types, special.get("unk_token"))
    bos = special.get("bos_token") if add_bos else None
    if bos is not None and bos not in real:
        raise bad_value("tokenizer.ggml.bos_token_id", "refers to an unused token")
    return Vocabulary(
        _core(added_tokens(real, types), _post_processor(bos, real), parts),
        special,
        chat_template,
        _end_token_ids(metadata, real, types),
    )


def to_metadata(
    tokenizer: Mapping[str, Any],
    *,
    vocab_size: int,
    special: Mapping[str, str | None],
    end_token_ids: Sequence[int],
    chat_template: str | None,
) -> dict[str, Any]:
    """Returns the GGUF metadata of a tokenizer.

    Args:
        tokenizer: The content of a ``tokenizer.json``.
        vocab_size: Number of rows of the embedding; rows without a token get unused tokens.
        special: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``; of encoders also ``cls_token``,
            ``sep_token`` and ``mask_token``.
        end_token_ids: Tokens that end an answer; the first becomes the end-of-text token.
        chat_template: Jinja template, or None.

    Raises:
        GgufError: llama.cpp does not support the tokenizer, or more tokens end an answer than GGUF can define.
    """
    model = tokenizer["model"]
    if model.get("type") in ("WordPiece", "Unigram"):
        return write_words(tokenizer, vocab_size, special)
    if model.get("type") != "BPE":
        raise GgufError(
            f"Tokenizers of kind {model.get('type')} cannot be written to GGUF.",
            why="supported are BPE, WordPiece and Unigram",
        )
    added = {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    tokens = [MISSING.format(number) for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    is_sentencepiece = bool(model.get("byte_fallback"))
    for number, entry in added.items():
        if number >= vocab_size:
            continue  # a token without a row in the embedding cannot be used anyway
        types[number] = CONTROL if entry["special"] else USER_DEFINED
        tokens[number] = entry["content"] if entry["special"] else entry["content"].replace(SPACE, " ")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    ids = {token: number for number, token in enumerate(tokens)}
    values: dict[str, Any] = {"ggml.model": "llama" if is_sentencepiece else "gpt2"}
    if is_sentencepiece:
        unknown = model.get("unk_token")
        values["ggml.pre"] = "default"
        values["ggml.scores"] = _scores(model, tokens)
        types = [
            UNKNOWN if token == unknown else BYTE if _is_byte(token) else type_
            for token, type_ in zip(tokens, types, strict=True)
        ]
        values["ggml.add_space_prefix"] = add_space_prefix(tokenizer)
    else:
        values["ggml.pre"] = find_pre(tokenizer)
        values["ggml.merges"] = merges
    values |= {"ggml.tokens": tokens, "ggml.token_type": types}
    for key, token in (SPECIAL | ENCODER_SPECIAL).items():
        text = special.get(token)
        if text is not None and text in ids:
            values[f"ggml.{key}_token_id"] = ids[text]
    if {"ggml.cls_token_id", "ggml.seperator_token_id"} <= values.keys():  # llama.cpp puts BOS and EOS around a text
        values |= {
            "ggml.bos_token_id": values["ggml.cls_token_id"],
            "ggml.eos_token_id": values["ggml.seperator_token_id"],
        }
        values |= dict.fromkeys(("ggml.add_bos_token", "ggml.add_eos_token"), True)
    else:
        values |= _end_metadata(tokens, end_token_ids)
        values["ggml.add_bos_token"] = _adds_bos(tokenizer, special.get("bos_token"))
    if chat_template is not None:
        values["chat_template"] = chat_template
    return {f"tokenizer.{key}": value for key, value in values.items()}


def _core(added: list[dict[str, Any]], post_processor: dict[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    empty = {"version": "1.0", "truncation": None, "padding": None}
    return {**empty, "added_tokens": added, **parts, "post_processor": post_processor}


def _special_tokens(metadata: Mapping[str, Any], kind: str, tokens: Sequence[str]) -> dict[str, str]:
    defaults = DEFAULTS.get(kind, {})
    special: dict[str, str] = {}
    is_encoder = kind == "bert" or (kind == "gpt2" and {_CLS, _SEP} <= metadata.keys())
    for key, token in (SPECIAL | ENCODER_SPECIAL if is_encoder else SPECIAL).items():
        number = special_token_id(metadata, key)
        number = defaults.get(key) if number is None else number
        if number is not None and number < len(tokens):
            special[token] = tokens[number]
    return special


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """Returns a list of strings; empty if the key is missing."""
    values = metadata.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise bad_value(key, "is not a list of strings")
    return values


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], pre: str) -> dict[str, Any]:
    merges = _strings(metadata, "tokenizer.ggml.merges")  # "a b": byte-level tokens contain no spaces
    return {
        "normalizer": None,
        "pre_tokenizer": byte_level(pre),
        "decoder": BYTE_LEVEL_DECODER,
        "model": _model(vocab, merges, ignore_merges=pre in IGNORES_MERGES),
    }


def _sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int], unknown: str | None
) -> dict[str, Any]:
    scores = read_scores(metadata, len(types))
    mergeable = [token for token, number in vocab.items() if types[number] == NORMAL and len(token) > 1]
    mergeable.sort(key=lambda token: (-scores[vocab[token]], vocab[token]))
    merges = [
        [token[:cut], token[cut:]]
        for token in mergeable
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model = _model(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    return {**sentencepiece(prefix=prefix), "model": model}


def _sentencepiece_with_merges(
    metadata: Mapping[str, Any], vocab: dict[str, int], unknown: str | None
) -> dict[str, Any]:
    merges = _strings(metadata, "tokenizer.ggml.merges")
    model = _model(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    # No token crosses the end of a row of line breaks.
    lines = {"type": "Split", "pattern": {"Regex": r"[^\n]+|[\n]+"}, "behavior": "Isolated", "invert": False}
    return {**sentencepiece(prefix=False), "pre_tokenizer": lines, "model": model}


def _model(vocab: dict[str, int], merges: list[str] | list[list[str]], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": vocab,
        "merges": merges,
    }


def _post_processor(bos: str | None, ids: Mapping[str, int]) -> dict[str, Any]:
    return template([] if bos is None else [bos], [], ids, types=(0, 1))


def _end_token_ids(metadata: Mapping[str, Any], ids: Mapping[str, int], types: Sequence[int]) -> list[int]:
    named = [special_token_id(metadata, key) for key in ("eos", "eot", "eom")]
    found = [number for number in named if number is not None]
    # Qwen also has a normal token "</s>", so only tokens that are marked as special count.
    found += sorted(ids[text] for text in END_TEXTS if text in ids and types[ids[text]] != NORMAL)
    return list(dict.fromkeys(found))


def _end_metadata(tokens: Sequence[str], end_token_ids: Sequence[int]) -> dict[str, Any]:
    """Returns metadata of the tokens that end an answer, except those that llama.cpp knows by their text."""
    if not end_token_ids:
        return {}
    first, *others = end_token_ids
    others = [number for number in others if tokens[number] not in END_TEXTS]
    if len(others) > 2:
        raise GgufError(
            f"{len(others) + 1} tokens end an answer, but a GGUF file can define only three.",
            where="eos_token_id",
            why=", ".join(tokens[number] for number in (first, *others)),
            fix="keep only those that the chat template uses in generation_config.json",
        )
    keys = ("ggml.eot_token_id", "ggml.eom_token_id")
    return {"ggml.eos_token_id": first} | dict(zip(keys, others, strict=False))


def _adds_bos(tokenizer: Mapping[str, Any], bos: str | None) -> bool:
    """Returns whether the post-processor adds the BOS token before every text."""
    processor = tokenizer.get("post_processor") or {}
    parts = processor.get("processors", [processor])
    singles = [part["single"] for part in parts if part.get("type") == "TemplateProcessing"]
    return any(bos is not None and single[0].get("SpecialToken", {}).get("id") == bos for single in singles if single)


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Scores in the order of merges: the negative index of the first merge that results in a token."""
    first: dict[str, int] = {}
    for index, pair in enumerate(model["merges"]):
        first.setdefault("".join(pair.split(" ")) if isinstance(pair, str) else "".join(pair), index)
    return [-float(first[token]) if token in first else 0.0 for token in tokens]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
