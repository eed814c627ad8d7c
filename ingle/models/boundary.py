"""Turns exceptions that libraries raise for a user's file into errors that name the file.

transformers, tokenizers and safetensors raise many kinds of exceptions for a damaged or contradictory file. A few
values are checked beforehand, because they would not raise but compute for hours or exhaust memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ingle.errors import Explained, ModelError

COMPARE_CONFIG = "compare config.json with the one that the model was published with"

#: No model has more layers or experts; transformers builds a list or module for each before it checks the number.
_MOST = {"layers": 1_024, "experts": 8_192}
_COUNTS = re.compile(r"^(?:n|num|number_of|decoder|encoder)_\w*?(layers?|experts?)(?:_\w+)?$|^\w*hidden_layers$")
#: Keys of sizes. None is larger than this, so that products of two of them fit 64 bits.
_SIZES = re.compile(r"(?:size|dim|heads?|embd|embeddings|positions|rank|inner|ctx)$")
_LARGEST = 2**31 - 1

#: Sizes that every decoder has, under transformers' names.
_POSITIVE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")

_LONGEST_WHY = 300


@contextmanager
def reading(path: Path | str, message: str, *, fix: str, settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turns exceptions inside the block into a :class:`ModelError`; Ingle's own errors pass.

    Args:
        path: The file or folder that is read.
        message: What failed, as a sentence.
        fix: What to do about it.
        settings: The file's content, in which an unknown value is looked up to name its key.

    Raises:
        ModelError: With the exception's text as the reason.
    """
    try:
        yield
    except Explained:
        raise
    except BaseException as error:
        # A panic in a Rust library is no Exception; neither are Ctrl-C and SystemExit, which pass.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise  # a valid model may be too large
        raise ModelError(message, where=str(path), why=explain(error, settings or {}), fix=fix) from error


def explain(error: BaseException, settings: Mapping[str, Any] | None = None) -> str:
    """Returns the type and text of an exception on one line, with the key that it concerns if known."""
    text = " ".join(str(error.__cause__ or error).split())
    kind = type(error.__cause__ or error).__name__
    field = re.match(r"Validation error for field '(\w+)'", str(error))
    key = field[1] if field else _key_of(error.args[0], settings or {}) if isinstance(error, KeyError) else None
    return (f"{key}: " if key else "") + (f"{kind}: {text}" if text else kind)[:_LONGEST_WHY]


def _key_of(value: object, settings: Mapping[str, Any]) -> str | None:
    for key, found in settings.items():
        if isinstance(found, dict) and (inner := _key_of(value, found)) is not None:
            return f"{key}.{inner}"
        if type(found) is type(value) and found == value:
            return key
    return None


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        ModelError: The file cannot be read, or contains something else.
    """
    fix = "fetch or copy the file again; it is damaged or incomplete"
    with reading(path, f"{path.name} cannot be read.", fix=fix):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is not a JSON object.", where=str(path), fix=fix)
    return found


def refuse_absurd(raw: Mapping[str, Any], path: Path) -> None:
    """Refuses implausible numbers in a ``config.json``, before a model is built from them.

    Raises:
        ModelError: It names the key.
    """
    for key, value in raw.items():
        if isinstance(value, dict):
            refuse_absurd(value, path)
        if isinstance(value, float) and math.isnan(value):
            raise ModelError(f"{key} is NaN, which is not a number.", where=str(path), fix=COMPARE_CONFIG)
        match = _COUNTS.match(key)
        if not isinstance(value, int) or not (match or _SIZES.search(key)):
            continue
        most = _LARGEST if match is None else _MOST["experts" if (match[1] or "").startswith("expert") else "layers"]
        if abs(value) > most:
            shown = f"{value:,}" if abs(value) < 10**18 else f"a number of {len(str(abs(value)))} digits"
            why = f"the largest accepted value is {most:,}"
            raise ModelError(f"{key} = {shown} is too large.", where=str(path), why=why, fix=COMPARE_CONFIG)


def refuse_impossible(config: Any, path: Path | str) -> None:
    """Refuses sizes that are not positive whole numbers.

    Raises:
        ModelError: It names the key as it is in the file.
    """
    names = getattr(config, "attribute_map", None) or {}
    for name in _POSITIVE:
        value = getattr(config, name, 1)
        if isinstance(value, list | tuple):
            continue  # one for each layer
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            key = names.get(name, name)
            raise ModelError(
                f"{key} must be a whole number above 0.", where=str(path), why=f"it is {value!r}", fix=COMPARE_CONFIG
            )
