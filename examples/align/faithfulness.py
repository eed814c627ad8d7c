"""Finds what a notice says wrongly about its record: values that it leaves out, and values that it makes up.

:func:`faithfulness` has the signature of TRL's reward functions.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

_DEMO = Path(__file__).parents[1] / "demo"
_PREPOSITION = re.compile(r"^(?:at|by|near|in|on|behind|under|outside|inside|beside|along) ")
_PERSON = re.compile(r"\b(?:Mr|Mrs|Miss|Dr) \w+")


def read_record(prompt: str) -> dict[str, str]:
    """Returns the fields of the record in a prompt, ``event: quiz night | place: the mill``."""
    fields = (field.partition(": ") for field in prompt.rsplit("\n", 1)[-1].split(" | "))
    return {name: value for name, _, value in fields if value}


def find_faults(prompt: str, answer: str) -> list[str]:
    """Returns a sentence for each value of the record that the answer leaves out, and for each that it makes up."""
    record, text = read_record(prompt), answer.lower()
    missing = [f"{name} is missing: {value}" for name, value in record.items() if value.lower() not in text]
    given = " | ".join(record.values()).lower()
    named = {*_known_values().findall(text), *(person.lower() for person in _PERSON.findall(answer))}
    return missing + [f"made up: {value}" for value in sorted(named) if value not in given]


def faithfulness(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Returns for each answer the share of its record that it states, less the share that it makes up; at least 0.

    Args:
        prompts: Texts or lists of messages, of which the last one has the record.
        completions: Texts or lists of messages.
    """
    scores = []
    for prompt, answer in zip(map(_text, prompts), map(_text, completions), strict=True):
        scores.append(max(0.0, 1 - len(find_faults(prompt, answer)) / max(1, len(read_record(prompt)))))
    return scores


def _text(part: Any) -> str:
    return part if isinstance(part, str) else str(part[-1]["content"])


@cache
def _known_values() -> re.Pattern[str]:
    """Matches every value that a record can have and that the wording of notices does not contain by itself."""
    lines = (_DEMO / "values.txt").read_text(encoding="utf-8").splitlines()
    frames = (_DEMO / "frames.txt").read_text(encoding="utf-8").lower()
    values = {line.removeprefix("* ").partition(";")[0].strip().lower() for line in lines if line[:1] not in "#="}
    cores = {_PREPOSITION.sub("", value) for value in values} - {""}
    found = sorted((value for value in cores if value not in frames), key=lambda value: (-len(value), value))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, found))})(?!\w)")
