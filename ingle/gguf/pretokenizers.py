"""Converts pre-tokenizers, which GGUF files name and a ``tokenizer.json`` defines in full.

Source: llama.cpp's ``src/llama-vocab.cpp``, which quotes the expressions of the models' own ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ingle.errors import GgufError

#: Sentencepiece's symbol for a space.
SPACE = "\u2581"

_WORD_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LATE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LATE_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

LLAMA3 = rf"{_WORD_ENDS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_LATE}"
QWEN2 = rf"{_WORD_ENDS}|{_LEAD}\p{{L}}+|\p{{N}}|{_LATE}"
_MARKED = r"[\p{L}\p{M}]"
QWEN35 = (
    rf"{_WORD_ENDS}|[^\r\n\p{{L}}\p{{N}}]?{_MARKED}+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED = rf"{_WORD_ENDS}|{_LEAD}\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_LATE_SLASH}"
GPT4O = rf"{_LEAD}{_UPPER}*{_LOWER}+{_WORD_ENDS}?|{_LEAD}{_UPPER}+{_LOWER}*{_WORD_ENDS}?|\p{{N}}{{1,3}}|{_LATE_SLASH}"

#: llama.cpp's names by expression; the first one is used for writing.
_SPLITS = {
    LLAMA3: (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("smaug-bpe", "dbrx", "chatglm-bpe", "glm4", "glm5"),
    ),
    QWEN2: ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    QWEN35: ("qwen35",),
    TEKKEN: ("tekken",),
    GPT4O: ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    BLOOM: ("bloom", "gpt3-finnish", "poro-chat"),
    SEED: ("seed-coder",),
}
_BY_NAME = {name: split for split, names in _SPLITS.items() for name in names}
_GPT2 = (
    *("gpt-2", "phi-2", "mellum", "a.x-4.0", "olmo", "mpt", "jais", "trillion", "granite-docling"),
    *("exaone4", "gigachat", "modern-bert"),
)
_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "exaone", "command-r", "minerva-7b", "mellum2")

#: Pre-tokenizers with which BOS is added by default.
ADDS_BOS = (
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "tekken",
)
#: Pre-tokenizers with which a piece of text that is a token is not split.
IGNORES_MERGES = (*ADDS_BOS, "glm4", "glm5")

BYTE_LEVEL_DECODER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def byte_level(pre: str) -> dict[str, Any]:
    """Returns the pre-tokenizer that llama.cpp calls ``pre``.

    Raises:
        GgufError: The name is unknown.
    """
    if pre in _GPT2:
        return _bytes(use_regex=True)
    if pre in _DIGITS:
        return _sequence({"type": "Digits", "individual_digits": True}, _bytes(use_regex=True))
    if pre not in _BY_NAME:
        raise GgufError(
            f"The pre-tokenizer {pre!r} is not supported.",
            where="tokenizer.ggml.pre",
            why=f"supported are {', '.join((*_GPT2, *_DIGITS, *_BY_NAME))}",
            fix="set model.tokenizer to a folder or hub id with the tokenizer.json of this model",
        )
    split = {"type": "Split", "pattern": {"Regex": _BY_NAME[pre]}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _bytes(use_regex=False))


def find_pre(tokenizer: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of the pre-tokenizer of a byte-level ``tokenizer.json``.

    Raises:
        GgufError: No supported name corresponds to it.
    """
    steps = _steps(tokenizer.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    normalizers = [step["type"] for step in _steps(tokenizer.get("normalizer"))]
    plain = normalizers in ([], ["NFC"]) and steps and not steps[-1].get("add_prefix_space")
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"]:
        names = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if names is not None:
            return names[0]
    raise GgufError(
        "llama.cpp has no name for the pre-tokenizer of this model.",
        where="tokenizer.json, pre_tokenizer",
        why=json.dumps(tokenizer.get("pre_tokenizer"))[:300],
    )


def sentencepiece(*, prefix: bool) -> dict[str, Any]:
    """Returns normalizer, pre-tokenizer and decoder of a sentencepiece vocabulary.

    Args:
        prefix: Whether a space is added before every text.
    """
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps = [{"type": "Prepend", "prepend": SPACE}, escape] if prefix else [escape]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def add_space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Returns whether a sentencepiece-like ``tokenizer.json`` adds a space before every text.

    Raises:
        GgufError: The tokenizer splits text in another way than llama.cpp's sentencepiece.
    """
    normalizers, cuts = _steps(tokenizer.get("normalizer")), _steps(tokenizer.get("pre_tokenizer"))
    kinds = [step["type"] for step in normalizers]
    metaspace = [step for step in cuts if step["type"] == "Metaspace"]
    odd = [step["type"] for step in cuts if step["type"] not in ("Metaspace", "Split")]
    if odd or set(kinds) - {"Prepend", "Replace"} or not (metaspace or "Replace" in kinds):
        raise GgufError(
            "This tokenizer splits text in another way than llama.cpp's sentencepiece.",
            where="tokenizer.json",
            why=json.dumps({key: tokenizer.get(key) for key in ("normalizer", "pre_tokenizer")})[:300],
        )
    return "Prepend" in kinds or any(step.get("prepend_scheme", "always") != "never" for step in metaspace)


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Returns the steps of a part of a ``tokenizer.json``, which can be a single step or a sequence."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return list(part.get("pretokenizers") or part.get("normalizers") or [])
