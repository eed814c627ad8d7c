"""Reads rows as examples, in one of several layouts.

:mod:`ingle.data.layout_detection` chooses the layout. Rows with labels, and pairs of source and target, are read by
:mod:`ingle.data.labelled_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ingle.config.data import Layout
from ingle.data.labelled_rows import MEDIA, parse_labelled
from ingle.data.messages import is_conversation, not_text, read_messages, read_tools
from ingle.data.preference_rows import parse_preference
from ingle.data.prompt_rows import parse_prompt
from ingle.data.types import Example, Message
from ingle.errors import DataError

#: Pairs of column names read as prompt and completion, in order of preference.
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)

#: Layouts in which a column that merely names a file or an address stays without effect, as other columns do.
_TEXTS: tuple[Layout, ...] = ("text", "instruction", "prompt-completion")
#: Maximum number of columns in a message.
_MAX_LISTED = 12


def list_columns(row: Mapping[str, Any]) -> str:
    """Returns the names of the first columns, for messages, and which of them are null."""
    names = [f"{str(name)[:80]}{' (null)' * (value is None)}" for name, value in row.items()]
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none") + more


def find_pair(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the columns that are read as prompt and completion; None if there are none."""
    present = [pair for pair in PAIRS if row.get(pair[0]) is not None]
    full = [pair for pair in present if row.get(pair[1]) is not None]
    if full:
        return full[0]
    return present[0] if present and row.get("references") is not None else None


def parse_row(row: Mapping[str, Any], layout: Layout, origin: str, first: str = "") -> Example:
    """Reads a row in a layout.

    Args:
        row: Column names and values.
        layout: Any but ``auto``.
        origin: ``file:line`` of the row.
        first: ``file:line`` of the row from which the layout was detected, for errors.

    Raises:
        DataError: The row does not fit the layout.
    """
    refuse_media(row, layout, origin)
    example = _Row(row, layout, origin, first).parse()
    for text in (*example.references, *(text for each in (example, *example.texts.values()) for text in _texts(each))):
        if not _is_unicode(text):
            why = "a text contains half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
            raise DataError("The row is malformed.", where=origin, why=why, fix="correct or remove the row")
    return example


def refuse_media(row: Mapping[str, Any], layout: Layout, origin: str) -> None:
    """Refuses a row with images, audio or video, which its texts or its label refer to.

    Raises:
        DataError: It has a column of them.
    """
    for name, kind in MEDIA.items():
        value = row.get(name)
        if value and not (isinstance(value, str) and layout in _TEXTS):
            raise not_text(f"the column {name!r} has {kind}", origin)


def _texts(example: Example) -> Iterator[str]:
    yield from (message.written for message in example.messages)
    yield from (text for text in (example.prompt, example.completion, example.text) if text is not None)
    yield example.tools


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Row:
    row: Mapping[str, Any]
    layout: Layout
    origin: str
    first: str

    def parse(self) -> Example:
        match self.layout:
            case "messages":
                return self._parse_turns("role", "content")
            case "sharegpt":
                return self._parse_turns("from", "value")
            case "instruction":
                return self._parse_instruction()
            case "prompt-completion":
                return self._parse_pair()
            case "text":
                return Example(self.origin, text=self._text("text"))
            case "preference" | "transcript" | "judged" | "ranked":
                try:
                    return parse_preference(self.row, self.layout, self.origin)
                except ValueError as error:
                    raise self._misfit(str(error)) from None
            case "prompts":
                try:
                    return parse_prompt(self.row, self.origin)
                except ValueError as error:
                    raise self._misfit(str(error)) from None
            case "auto":
                raise AssertionError("detect_layout decides first")
            case _:
                try:
                    return parse_labelled(self.row, self.layout, self.origin)
                except ValueError as error:
                    raise self._misfit(str(error)) from None

    def _misfit(self, why: str) -> DataError:
        known = self.first and self.first != self.origin
        since = f"; the file is read as {self.layout} since {self.first}" if known else ""
        return DataError(
            f"The row does not fit the layout {self.layout}.",
            where=self.origin,
            why=f"{why}{since}",
            fix="correct the row, or set data.sources: layout: or columns:",
        )

    def _text(self, name: str) -> str:
        value = self.row.get(name)
        if isinstance(value, str):
            return value
        found = f"is {type(value).__name__}, not text" if value is not None else "is missing"
        raise self._misfit(f"{name!r} {found}; the columns are {list_columns(self.row)}")

    def _references(self) -> tuple[str, ...]:
        value = self.row.get("references")
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._misfit("'references' must be a list of strings")
        return tuple(dict.fromkeys(value))

    def _answers(self, *names: str) -> tuple[str, ...]:
        """Returns all accepted answers: the first of the named columns that has a value, then ``references``."""
        references = self._references()
        name = next((name for name in names if self.row.get(name) is not None), None)
        if name is None and references:
            return references
        answer = self._text(name or names[0])
        return (answer, *(reference for reference in references if reference != answer))

    def _make_pair(self, prompt: str, answers: tuple[str, ...]) -> Example:
        system = self.row.get("system")
        if not isinstance(system, str) or not system.strip():
            return Example(self.origin, prompt=prompt, completion=answers[0], references=answers[1:])
        turns = (Message("system", system), Message("user", prompt.strip()), Message("assistant", answers[0].strip()))
        return Example(self.origin, messages=turns, references=answers[1:])

    def _parse_pair(self) -> Example:
        row = self.row
        prompt, answer = find_pair(row) or ("prompt", "completion")
        if is_conversation(row.get(prompt)):  # a conversational pair: both columns are lists of messages
            turns = list(row[prompt]) + (list(row[answer]) if isinstance(row.get(answer), list) else [])
            joined = {"messages": turns, "references": row.get("references"), "tools": row.get("tools")}
            return _Row(joined, "messages", self.origin, self.first).parse()
        return self._make_pair(self._text(prompt), self._answers(answer))

    def _parse_instruction(self) -> Example:
        parts = [self._text("instruction").strip()]
        if self.row.get("input") is not None:
            parts.append(self._text("input").strip())
        answers = self._answers("output", "response")
        # The blank line separates question and answer where there is no chat template to do so.
        return self._make_pair("\n\n".join(part for part in parts if part) + "\n\n", answers)

    def _parse_turns(self, role_key: str, content_key: str) -> Example:
        turns = self.row.get("messages")
        if turns is None:
            turns = self.row.get("conversations")
        try:
            messages = read_messages(turns, self.origin, role_key, content_key)
            tools = read_tools(self.row.get("tools"))
        except ValueError as error:
            raise self._misfit(str(error)) from None
        references = self._references()
        if references and messages[-1].role != "assistant":
            messages.append(Message("assistant", references[0]))
        answer = messages[-1].content if messages[-1].role == "assistant" else None
        others = tuple(each for each in references if each != answer)
        return Example(self.origin, tuple(messages), references=others, tools=tools)
