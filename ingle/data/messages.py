"""Reads the messages of a conversation, and its tools, from the values of a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ingle.data.types import Message
from ingle.errors import DataError

#: Names of roles in datasets, and the roles of chat templates that they stand for.
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
#: How the types of parts of a message begin that are not text.
_MEDIA_PARTS = ("image", "input_image", "audio", "input_audio", "video")


def _is_media(part: object) -> bool:
    """Returns whether a part of a message is an image, audio or video."""
    return isinstance(part, Mapping) and str(part.get("type")).startswith(_MEDIA_PARTS)


def is_conversation(value: object, role_key: str = "role") -> bool:
    """Returns whether a value is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and role_key in value[0]


def not_text(why: str, origin: str) -> DataError:
    """Returns the error for a row with images, audio or video."""
    return DataError(
        "The row is not only text, and models are trained on text only.",
        where=origin,
        why=why,
        fix="replace images and audio by text that describes them, or remove the row",
    )


def read_messages(turns: object, origin: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """Reads a list of messages.

    Args:
        turns: The value of a column.
        origin: ``file:line`` of the row.
        role_key: The key of the role in a message.
        content_key: The key of its content.

    Raises:
        ValueError: It is not a list of messages of a known form.
        DataError: A message has an image, audio or video.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError("there is no list of messages, or it is empty")
    return [_read_message(number, turn, origin, role_key, content_key) for number, turn in enumerate(turns, 1)]


def _read_message(number: int, turn: object, origin: str, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn:
        raise ValueError(f"message {number} has no {role_key!r}")
    role = ROLES.get(str(turn[role_key]).lower())
    if role is None:
        known = ", ".join(ROLES)
        raise ValueError(f"message {number} has the role {turn[role_key]!r}; known roles are {known}")
    for name in ("reasoning_content", "thinking"):
        if turn.get(name):
            raise ValueError(f"message {number} has {name!r}, which is not supported")
    if role == "assistant" and (turn.get("weight") == 0 or turn.get("train") is False):
        raise ValueError(f"message {number} is excluded from training (weight, train), which is not supported")
    calls = _read_calls(number, turn.get("tool_calls")) if role == "assistant" else ""
    content = turn.get(content_key)
    if content is None and calls:
        content = ""
    if isinstance(content, list) and content:  # parts, as in multimodal data; only texts can be read
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            content = "".join(text for text in texts if isinstance(text, str))
        elif other := [str(part.get("type")) for part in content if _is_media(part)]:
            raise not_text(f"message {number} has a part of type {other[0][:80]!r}", origin)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} is not text")
    if role != "tool":
        return Message(role, content, calls)
    name, call = (str(turn.get(key) or "") for key in ("name", "tool_call_id"))
    return Message(role, content, name=name, call_id=call)


def _read_calls(number: int, calls: object) -> str:
    """Returns the calls of tools in a message as JSON; arguments that are JSON texts become mappings.

    Chat templates expect mappings; the API that made the format popular returns texts.
    """
    if isinstance(calls, str) and calls.strip():
        calls = _parse_json(calls, f"'tool_calls' of message {number}")
    if not calls:
        return ""
    found: list[Any] = []
    for call in _as_list(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a call in 'tool_calls' of message {number} has no name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parse_json(arguments or "{}", f"the arguments of a call in message {number}")
        function = {**function, "arguments": {} if arguments is None else arguments}
        outer = call if "function" in call else {"type": "function"}
        found.append({**outer, "function": function})
    return json.dumps(found, ensure_ascii=False)


def read_tools(tools: object) -> str:
    """Reads the tools of a conversation: a list of descriptions, or its JSON text; returns JSON, empty without tools.

    Raises:
        ValueError: It is anything else.
    """
    if isinstance(tools, str) and tools.strip():
        tools = _parse_json(tools, "'tools'")
    if not tools:
        return ""
    functions = [each.get("function", each) if isinstance(each, Mapping) else None for each in _as_list(tools)]
    if not all(isinstance(each, Mapping) and isinstance(each.get("name"), str) for each in functions):
        raise ValueError("'tools' must be a list of functions with names")
    return json.dumps(_as_list(tools), ensure_ascii=False)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{what} is text, but not JSON") from None
