"""Special tokens of GGUF tokenizers: their types and numbers, and where they are put around a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ingle.errors import GgufError

#: Types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

#: Text of a row of the embedding without a token.
MISSING = "[PAD{}]"
#: What to do about a tokenizer that cannot be read.
FIX = "set model.tokenizer to a folder or hub id with the tokenizer.json of this model"
#: GGUF's names of special tokens and those of transformers.
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
#: Further ones of encoders.
ENCODER_SPECIAL = {"cls": "cls_token", "seperator": "sep_token", "mask": "mask_token"}
#: The tokens that llama.cpp assumes by kind if a file does not name them.
DEFAULTS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"cls": 101, "unknown": 100, "seperator": 102, "padding": 0, "mask": 103},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
}


def special_token_id(metadata: Mapping[str, Any], key: str) -> int | None:
    """Returns the token that a file defines as ``bos``, ``eos``, ``eot``, ``eom``, ``unknown`` or ``padding``, or None.

    Raises:
        GgufError: The file has no such token.
    """
    name = f"tokenizer.ggml.{key}_token_id"
    number = metadata.get(name)
    if number is None:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 2**31
    if type(number) is int and key in ("padding", "unknown") and number >= count:
        return None  # llama.cpp ignores such a number, and some of its converters write 2^32 - 1
    if type(number) is not int or not 0 <= number < count:
        raise bad_value(name, f"is {str(number)[:60]}; the file has {count:,} tokens")
    return number


def bad_value(key: str, problem: str) -> GgufError:
    """Returns the error for an invalid part of a tokenizer."""
    return GgufError(f"{key} {problem}.", where=key, fix=f"download or copy the file again, or {FIX}")


def added_tokens(vocab: Mapping[str, int], types: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the tokens that no text is split into, in the layout of a ``tokenizer.json``."""
    return [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": types[number] in (CONTROL, UNKNOWN)}
        for token, number in vocab.items()
        if types[number] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def read_scores(metadata: Mapping[str, Any], count: int) -> list[float]:
    """Returns the score of each token.

    Raises:
        GgufError: The file does not have them.
    """
    key = "tokenizer.ggml.scores"
    found: Any = metadata.get(key)
    is_list = isinstance(found, list) and all(isinstance(each, int | float) and each == each for each in found)
    if not is_list or len(found) != count:
        raise bad_value(key, f"does not have a number for each of the {count:,} tokens")
    return list(found)


def template(
    first: Sequence[str], last: Sequence[str], ids: Mapping[str, int], *, types: tuple[int, int]
) -> dict[str, Any]:
    """Returns the post-processor that puts tokens around each text.

    Args:
        first: Before a text; before the second text of a pair only if there are none after the first one.
        last: After a text.
        ids: Numbers of tokens.
        types: Token types of the first and of the second text.
    """

    def special(tokens: Sequence[str], kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}} for token in tokens]

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    one, two = types
    single = [*special(first, one), text("A", one), *special(last, one)]
    again = special(first, two) if not last else []
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *again, text("B", two), *special(last, two)],
        "special_tokens": {each: {"id": each, "ids": [ids[each]], "tokens": [each]} for each in (*first, *last)},
    }
