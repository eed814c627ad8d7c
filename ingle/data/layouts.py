"""Rows to examples: what the columns of a row mean.

Five layouts are known; ``columns`` renames a file's own names into theirs first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.config.data import Layout
from ingle.data.types import Example, Message
from ingle.errors import DataError

#: Pairs of column names read as prompt and completion, best first.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)

#: Roles as they are written in the wild, to the ones chat templates know.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}


#: Columns that a message names at most.
_MAX_NAMED = 12


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str], origin: str) -> dict[str, Any]:
    """The row with ``{name a layout knows: name in the file}`` applied.

    Raises:
        DataError: The file has no such column.
    """
    renamed = dict(row)
    for name, own in columns.items():
        if own not in row:
            raise DataError(
                f"There is no column {own!r}.",
                where=origin,
                why=f"the columns are {_columns(row)}",
                fix="correct data.sources: columns: {name for Ingle: name in the file}",
            )
        renamed[name] = row[own]
        if own not in columns:
            renamed.pop(own, None)
    return renamed


def detect_layout(row: Mapping[str, Any], origin: str) -> tuple[Layout, tuple[Layout, ...]]:
    """The layout a row's columns fit best, and the others they fit too.

    Raises:
        DataError: They fit none.
    """
    row = {key: value for key, value in row.items() if value is not None}
    fits: list[Layout] = []
    if _is_turns(row.get("messages"), "role") or _is_turns(row.get("conversations"), "role"):
        fits.append("messages")
    if _is_turns(row.get("conversations"), "from") or _is_turns(row.get("messages"), "from"):
        fits.append("sharegpt")
    if "instruction" in row and _has_answer(row, "output", "response"):
        fits.append("instruction")
    elif _find_pair(row) is not None:
        fits.append("prompt-completion")
    if "text" in row:
        fits.append("text")
    if "chosen" in row and "rejected" in row and fits in ([], ["messages"]):
        raise _preferences(row, origin)
    if not fits:
        raise DataError(
            "The columns fit no known layout.",
            where=origin,
            why=_why_none(row),
            fix="rename them with data.sources: columns: {prompt: ..., completion: ...} or {text: ...}",
        )
    return fits[0], tuple(fits[1:])


def _columns(row: Mapping[str, Any]) -> str:
    names = [str(name)[:80] for name in row]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return (", ".join(names[:_MAX_NAMED]) or "none") + more


def _preferences(row: Mapping[str, Any], origin: str) -> DataError:
    """Pairs of a better and a worse answer, which no objective can learn from yet."""
    if _is_turns(row["chosen"], "role") and not _is_turns(row.get("prompt"), "role"):
        fix = "columns: {messages: chosen}"
    else:
        prompt = next((name for name in ("prompt", "question", "instruction", "input") if name in row), None)
        fix = f"columns: {{prompt: {prompt}, completion: chosen}}" if prompt else "columns: {text: chosen}"
    return DataError(
        "This looks like preference data: every row has a chosen and a rejected answer.",
        where=origin,
        why="there is no objective for preferences yet; sft learns from one answer a row",
        fix=f"to train on the chosen answers alone: data.sources=[{{path: {origin.rpartition(':')[0]}, {fix}}}]",
    )


def _why_none(row: Mapping[str, Any]) -> str:
    why = f"the columns are {_columns(row)}"
    for name in ("messages", "conversations"):
        if name in row:
            why += f'; {name} must be a list such as [{{"role": "user", "content": "..."}}, ...], with a message in it'
    if len(row) == 1 and (separators := [mark for mark in (";", "\t", "|") if mark in str(next(iter(row)))]):
        why += f"; fields stand between commas, in .tsv between tabs, and here perhaps between {separators[0]!r}"
    return why


def _is_turns(value: object, key: str) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and key in value[0]


def _has_answer(row: Mapping[str, Any], *names: str) -> bool:
    return any(name in row for name in (*names, "references"))


def _find_pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    present = [pair for pair in PAIRS if row.get(pair[0]) is not None]
    full = [pair for pair in present if row.get(pair[1]) is not None]
    if full:
        return full[0]
    return present[0] if present and row.get("references") is not None else None


def parse_row(row: Mapping[str, Any], layout: Layout, origin: str, first: str = "") -> Example:
    """Read a row in a layout.

    Args:
        row: Column names and values.
        layout: Any but ``auto``.
        origin: ``file:line`` of the row.
        first: ``file:line`` of the row that decided the layout, for the message.

    Raises:
        DataError: The row does not fit the layout.
    """
    example = _parse(row, layout, origin, first)
    texts = (*(message.content for message in example.messages), example.prompt, example.completion, example.text)
    for text in (*texts, *example.references):
        if text is not None and not _is_unicode(text):
            why = "a text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
            raise DataError("The row is malformed.", where=origin, why=why, fix="correct or remove the row")
    return example


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(row: Mapping[str, Any], layout: Layout, origin: str, first: str) -> Example:
    match layout:
        case "messages":
            return _parse_turns(row, origin, first, layout, "role", "content")
        case "sharegpt":
            return _parse_turns(row, origin, first, layout, "from", "value")
        case "instruction":
            return _parse_instruction(row, origin, first)
        case "prompt-completion":
            return _parse_pair(row, origin, first)
        case "text":
            return Example(origin, text=_text(row, "text", origin, first, layout))
        case "auto":
            raise AssertionError("detect_layout decides first")


def _misfit(row: Mapping[str, Any], origin: str, first: str, layout: str, why: str) -> DataError:
    since = f"; the file is read as {layout} since {first}" if first and first != origin else ""
    return DataError(
        f"The row does not fit the layout {layout}.",
        where=origin,
        why=f"{why}{since}",
        fix="correct the row, or set data.sources: layout: or columns:",
    )


def _text(row: Mapping[str, Any], name: str, origin: str, first: str, layout: str) -> str:
    value = row.get(name)
    if isinstance(value, str):
        return value
    found = f"is {type(value).__name__}, not text" if value is not None else "is missing"
    raise _misfit(row, origin, first, layout, f"{name!r} {found}; the columns are {_columns(row)}")


def _references(row: Mapping[str, Any], origin: str, first: str, layout: str) -> tuple[str, ...]:
    value = row.get("references")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _misfit(row, origin, first, layout, "'references' must be a list of texts")
    return tuple(dict.fromkeys(value))


def _answered(row: Mapping[str, Any], names: tuple[str, ...], origin: str, first: str, layout: str) -> tuple[str, ...]:
    """All accepted answers: the first of the named columns that is there, then ``references``."""
    references = _references(row, origin, first, layout)
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None and references:
        return references
    answer = _text(row, name or names[0], origin, first, layout)
    return (answer, *(reference for reference in references if reference != answer))


def _pair_example(row: Mapping[str, Any], origin: str, prompt: str, answers: tuple[str, ...]) -> Example:
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        turns = (Message("system", system), Message("user", prompt.strip()), Message("assistant", answers[0].strip()))
        return Example(origin, messages=turns, references=answers[1:])
    return Example(origin, prompt=prompt, completion=answers[0], references=answers[1:])


def _parse_pair(row: Mapping[str, Any], origin: str, first: str) -> Example:
    layout = "prompt-completion"
    prompt, answer = _find_pair(row) or ("prompt", "completion")
    if _is_turns(row.get(prompt), "role"):  # a conversational pair: both columns hold messages
        turns = list(row[prompt]) + (list(row[answer]) if isinstance(row.get(answer), list) else [])
        joined = {"messages": turns, "references": row.get("references"), "tools": row.get("tools")}
        return _parse_turns(joined, origin, first, "messages", "role", "content")
    return _pair_example(
        row, origin, _text(row, prompt, origin, first, layout), _answered(row, (answer,), origin, first, layout)
    )


def _parse_instruction(row: Mapping[str, Any], origin: str, first: str) -> Example:
    layout = "instruction"
    parts = [_text(row, "instruction", origin, first, layout).strip()]
    if row.get("input") is not None:
        parts.append(_text(row, "input", origin, first, layout).strip())
    answers = _answered(row, ("output", "response"), origin, first, layout)
    # The blank line at the end parts question from answer where there is no chat template to do so.
    return _pair_example(row, origin, "\n\n".join(part for part in parts if part) + "\n\n", answers)


def _parse_turns(
    row: Mapping[str, Any], origin: str, first: str, layout: str, role_key: str, content_key: str
) -> Example:
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _misfit(row, origin, first, layout, "there is no list of messages, or it is empty")
    if row.get("tools") not in (None, [], "", "[]"):
        why = "the row has 'tools', which the chat template would show the model, and which are not supported yet"
        raise _misfit(row, origin, first, layout, why)
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or role_key not in turn:
            raise _misfit(row, origin, first, layout, f"message {number} has no {role_key!r}")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            why = f"message {number} has the role {turn[role_key]!r}; known are {', '.join(ROLES)}"
            raise _misfit(row, origin, first, layout, why)
        for name in ("tool_calls", "reasoning_content", "thinking"):
            if turn.get(name):
                raise _misfit(row, origin, first, layout, f"message {number} has {name!r}, which is not supported yet")
        if role == "assistant" and (turn.get("weight") == 0 or turn.get("train") is False):
            why = f"message {number} is marked as not to be trained on (weight, train), which is not supported yet"
            raise _misfit(row, origin, first, layout, why)
        messages.append(Message(role, _content(turn.get(content_key), number, row, origin, first, layout)))
    references = _references(row, origin, first, layout)
    if references and messages[-1].role != "assistant":
        messages.append(Message("assistant", references[0]))
    return Example(
        origin,
        messages=tuple(messages),
        references=tuple(r for r in references if messages[-1].role != "assistant" or r != messages[-1].content),
    )


def _content(value: object, number: int, row: Mapping[str, Any], origin: str, first: str, layout: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:  # parts, as multimodal data has them; texts alone can be read
        texts = [part.get("text") for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if isinstance(text, str))
    raise _misfit(row, origin, first, layout, f"the content of message {number} is not text")
