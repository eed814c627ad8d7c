"""Rows of which only the prompt is tokenized: the layout ``prompts``, for objectives that sample the answers.

A prompt is a text or a list of messages. Rows of every other layout with prompts are read too: of a conversation that
ends with an answer, what comes before it; of preferences, what their answers have in common. All columns are kept for
rewards, and the answer of a row, if it has one, becomes the column ``answer``.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ingle.data.messages import is_conversation, read_messages, read_tools
from ingle.data.preference_rows import detect_preference, parse_preference, shared_length
from ingle.data.types import Example, Message, last_answer

#: Columns with a prompt, in order of preference.
PROMPTS = ("prompt", "question", "query", "problem", "instruction", "input")
_CONVERSATIONS = ("messages", "conversations")
#: Columns with an answer, in order of preference.
_ANSWERS = ("answer", "completion", "response", "output")
#: Arguments that rewards have of their own; columns of these names would clash with them.
RESERVED = frozenset(
    ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
)


def has_prompt(row: Mapping[str, Any]) -> bool:
    """Returns whether a row has a prompt."""
    given = {name: value for name, value in row.items() if value is not None}
    if any(isinstance(given.get(name), str) or is_conversation(given.get(name)) for name in PROMPTS):
        return True
    turns = (given.get(name) for name in _CONVERSATIONS)
    if any(is_conversation(each) or is_conversation(each, "from") for each in turns):
        return True
    return detect_preference(given, "dpo") is not None


def parse_prompt(row: Mapping[str, Any], origin: str) -> Example:
    """Reads the prompt of a row, and its columns.

    Returns:
        A conversation that ends with a question, or a prompt with an empty completion.

    Raises:
        ValueError: The row has no prompt.
        DataError: A message has an image, audio or video.
    """
    asked, answer = _read(row, origin)
    columns, remarks = _keep_columns(row)
    own = next((row[name] for name in _ANSWERS if row.get(name) is not None), answer)
    if own is not None and "answer" not in columns:
        columns["answer"] = _plain(own)
    return replace(asked, labels={}, columns=columns, remarks=asked.remarks + remarks)


def _read(row: Mapping[str, Any], origin: str) -> tuple[Example, str | None]:
    """Returns the prompt of a row, and its answer if that is part of a conversation."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return _ask(row, prompt, origin), None
    if is_conversation(prompt):
        messages = read_messages(prompt, origin)
        if messages[-1].role == "assistant":
            raise ValueError("the prompt ends with a message of the assistant, which cannot be continued")
        return _converse(row, messages, origin), None
    for name in _CONVERSATIONS:
        for keys in (("role", "content"), ("from", "value")):
            if is_conversation(row.get(name), keys[0]):
                return _cut_answer(_converse(row, read_messages(row[name], origin, *keys), origin))
    layout = detect_preference(row, "dpo")
    if layout in ("preference", "transcript"):
        return _read_common(parse_preference(row, layout, origin))
    name = next((name for name in PROMPTS if isinstance(row.get(name), str)), "")
    if not name:
        raise ValueError(f"it has no prompt: none of {', '.join((*PROMPTS, *_CONVERSATIONS))}")
    if name == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        return _ask(row, f"{row[name].strip()}\n\n{row['input'].strip()}", origin), None
    return _ask(row, row[name], origin), None


def _cut_answer(example: Example) -> tuple[Example, str | None]:
    """Returns a conversation without the answer that it ends with, and the answer."""
    *before, last = example.messages
    before = before if last.role == "assistant" else [*before, last]
    if not any(turn.role in ("user", "tool") for turn in before):
        raise ValueError("the conversation has no message of a user before its answer")
    return replace(example, messages=tuple(before)), last.written if last.role == "assistant" else None


def _read_common(row: Example) -> tuple[Example, str | None]:
    """Returns what all answers of a row have in common, and the first answer."""
    first = next(iter(row.texts.values()))
    if first.completion is not None:
        return replace(first, completion=""), first.completion
    messages = [text.messages for text in row.texts.values()]
    common, _ = _cut_answer(replace(first, messages=first.messages[: shared_length(messages)], remarks=row.remarks))
    return common, last_answer(first)


def _ask(row: Mapping[str, Any], prompt: str, origin: str) -> Example:
    system, tools = row.get("system"), read_tools(row.get("tools"))
    if not tools and not (isinstance(system, str) and system.strip()):
        return Example(origin, prompt=prompt, completion="")
    return _converse(row, [Message("user", prompt.strip())], origin)


def _converse(row: Mapping[str, Any], messages: Sequence[Message], origin: str) -> Example:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0].role not in ("system", "developer"):
        messages = (Message("system", system), *messages)
    return Example(origin, messages=tuple(messages), tools=read_tools(row.get("tools")))


def _keep_columns(row: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the columns that rewards get, and remarks on those that they do not."""
    kept, remarks = dict[str, Any](), []
    for name, value in row.items():
        if name in RESERVED:
            continue
        try:
            kept[name] = _plain(value)
        except TypeError:
            remarks.append(f"Rewards do not get the column {name!r}: it is not text, numbers or lists of them.")
    return kept, tuple(remarks)


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it: dates as text, decimal numbers as numbers.

    Raises:
        TypeError: It contains something else, such as bytes.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, decimal.Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(type(value).__name__)


def write_column(value: Any) -> str:
    """Returns the value of a column for people: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
