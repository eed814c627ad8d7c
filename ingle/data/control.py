"""Keeps control tokens in messages plain text.

A chat template writes control tokens around messages (``<|im_start|>``, ``</s>``). If a message contains the same
characters, a tokenizer reads them as the same tokens, so a message could begin or end a turn. Two steps prevent this:

1. Before a conversation is rendered, control tokens in messages are replaced by private-use characters, one for one.
   All control tokens in the rendering then come from the template.
2. The rendering is tokenized with a copy of the tokenizer in which the control tokens have private names. The
   template's control tokens are written with these names, and messages have their original characters, which are now
   plain text.

The text is still tokenized as a whole, and every character keeps its position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from ingle.data.backend import copy_backend
from ingle.data.template import has_template, render
from ingle.data.types import Message, Tokenizer
from ingle.errors import DataError

Policy = Literal["keep", "escape", "refuse"]

#: First private character for messages and for names of control tokens; there are 65,534 of each.
_FOR_MESSAGES, _FOR_TOKENS, _SIZE = 0xF0000, 0x100000, 0xFFFE

#: A control token contains one of these; templates write other added tokens as ordinary words.
_BRACKETS = frozenset("<>[]{}|")

_PROBE = (Message("system", "Sys9"), Message("user", "Ask9"), Message("assistant", "Say9"), Message("user", "End9"))


@dataclass(frozen=True, slots=True)
class Shielded:
    """Messages with their control tokens hidden from the template.

    Attributes:
        messages: The messages, with private characters in place of control tokens.
        tokens: The control tokens that they contained, each once.
        hidden: The original character of each private character; None if nothing is hidden.
        ends_removed: Number of answers from which an end-of-turn token was removed.
        tools: The tools of the conversation, with private characters as well.
    """

    messages: tuple[Message, ...]
    tokens: tuple[str, ...] = ()
    hidden: Mapping[int, str] | None = None
    ends_removed: int = 0
    tools: str = ""

    def reveal(self, text: str) -> str:
        """Returns a text with the original characters; the length stays the same."""
        return text.translate(self.hidden) if self.hidden else text


@dataclass(frozen=True, slots=True)
class _Seen:
    """Added tokens that a template writes in a conversation: anywhere around messages, and at three places."""

    around: set[str]
    before_asking: set[str]
    before_answer: set[str]
    after_answer: set[str]


@dataclass(frozen=True, slots=True)
class _Known:
    """The control tokens of a tokenizer, and patterns that find them.

    Attributes:
        tokens: The control tokens.
        ends: Those that end an answer.
        every: Finds all added tokens.
        any: Finds control tokens.
        folded: The tokenizer's normalizer, and a pattern for control tokens in normalized text; None if the tokenizer
            matches all of them before normalization.
    """

    tokens: frozenset[str]
    ends: tuple[str, ...]
    every: re.Pattern[str]
    any: re.Pattern[str]
    folded: tuple[Callable[[str], str], re.Pattern[str]] | None


class ControlTokens:
    """The control tokens of a tokenizer and its template, and what happens to them in messages.

    Control tokens are the special tokens, and the added tokens that the chat template writes around messages. Paired
    tags (``<think>`` and ``</think>``) are not control tokens: templates and data use them inside messages. Neither is
    white space.

    Args:
        tokenizer: With or without a chat template.
        policy: As ``data.control_tokens``.

    Raises:
        ModelError: The template takes too much time or memory.
    """

    def __init__(self, tokenizer: Tokenizer, policy: Policy = "escape") -> None:
        self.policy = policy
        self._tokenizer = tokenizer

    @property
    def tokens(self) -> frozenset[str]:
        """The control tokens."""
        return self._known.tokens

    @cached_property
    def _known(self) -> _Known:
        tokenizer = self._tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:  # a slow tokenizer, which copy_backend refuses
            return _Known(frozenset(), (), _compile(()), _compile(()), None)
        added = backend.get_added_tokens_decoder()
        contents = {token.content for token in added.values()}
        special = {token.content for index, token in added.items() if token.special}
        special |= {added[index].content for index in tokenizer.all_special_ids if index in added}
        named = {added[i].content for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i in added}
        every = _compile(contents)
        seen = _probe(tokenizer, every)
        declared = getattr(tokenizer, "chat_control_tokens", None)
        written = seen.around if declared is None else set(declared)
        pairs = [pair for pair in map(_pair, contents) if pair and pair <= contents]
        # [INST] and [/INST] are a pair, too; but a tag that precedes questions and not answers marks a role.
        roles = named | (seen.before_asking - seen.before_answer)
        tags = {half for pair in pairs if not pair & roles for half in pair}
        tokens = frozenset(
            content for content in (special | written) & contents if content not in tags and not content.isspace()
        )
        end = {added[tokenizer.eos_token_id].content} if tokenizer.eos_token_id in added else set()
        normalize = backend.normalizer.normalize_str if backend.normalizer is not None else None
        folded = {token.content for token in added.values() if token.normalized} & tokens
        return _Known(
            tokens=tokens,
            ends=tuple(sorted((seen.after_answer | end) & tokens)),
            every=every,
            any=_compile(tokens),
            folded=(normalize, _compile(map(normalize, folded))) if normalize is not None and folded else None,
        )

    def find(self, text: str) -> list[str]:
        """Returns the parts of a text that a tokenizer would read as control tokens, in order."""
        found: list[str] = self._known.any.findall(text)
        if not found and self._known.folded is not None:
            normalize, pattern = self._known.folded
            found = pattern.findall(normalize(text))
        return found

    def shield(self, messages: Sequence[Message], origin: str, tools: str = "") -> Shielded:
        """Hides the control tokens in messages and tools from the template, according to the policy.

        Args:
            messages: A conversation.
            origin: ``file:line``, for the error.
            tools: Its tools, as JSON.

        Raises:
            DataError: There is a control token, and ``data.control_tokens`` is ``refuse``.
        """
        found = [self.find(message.written) for message in messages]
        if tools:
            found.append(self.find(tools))
        if not any(found):
            return Shielded(tuple(messages), tools=tools)
        if self.policy == "keep":
            return Shielded(tuple(messages), _distinct(found), tools=tools)
        if self.policy == "refuse":
            number = next(i for i, each in enumerate(found) if each)
            name = "tools" if number == len(messages) else f"message {number + 1} ({messages[number].role})"
            raise DataError(
                "A message contains a control token.",
                where=origin,
                why=f"{name} contains {found[number][0]!r}",
                fix="remove it from the row, or use --data.control_tokens=escape, which reads it as text",
            )
        kept = tuple(self._without_end(message) for message in messages)
        ends_removed = sum(before is not after for before, after in zip(messages, kept, strict=True))
        tokens = _distinct([*(self.find(message.written) for message in kept), self.find(tools)])
        if not tokens:
            return Shielded(kept, ends_removed=ends_removed, tools=tools)
        taken = {char for text in (*(message.written for message in kept), tools) for char in text}
        private = _choose_private(sorted(self.tokens & set(tokens)), taken, origin)

        def hide(text: str) -> str:
            return self._known.any.sub(lambda match: private[match[0]], text)

        return Shielded(
            tuple(Message(m.role, hide(m.content), hide(m.tool_calls), hide(m.name), hide(m.call_id)) for m in kept),
            tokens,
            {ord(theirs): own for token, name in private.items() for own, theirs in zip(token, name, strict=True)},
            ends_removed,
            hide(tools),
        )

    def _without_end(self, message: Message) -> Message:
        """Removes an end of turn from an answer, because the template writes one."""
        if message.role != "assistant":
            return message
        content = message.content
        while end := next((end for end in self._known.ends if content.rstrip().endswith(end)), None):
            content = content.rstrip().removesuffix(end)
        return message if content == message.content else replace(message, content=content)

    def encode(self, text: str, shielded: str, origin: str, *, add_special_tokens: bool) -> Any:
        """Encodes a text in which only the template's control tokens are tokens.

        Args:
            text: The text.
            shielded: The text with the control tokens of messages hidden.
            origin: ``file:line``, for the error.
            add_special_tokens: Whether the tokenizer adds its own special tokens.

        Returns:
            An encoding of the ``tokenizers`` library with offsets in ``text``.

        Raises:
            DataError: The tokenizer cannot distinguish the control tokens.
        """
        hidden = self._renamed.encode(self._put_names(shielded, shielded), add_special_tokens=add_special_tokens)
        usual = self._exact.encode(shielded, add_special_tokens=add_special_tokens)
        if (hidden.ids, hidden.offsets) != (usual.ids, usual.offsets):
            raise DataError(
                "The control tokens in a message cannot be distinguished from those of the chat template.",
                where=origin,
                why="the tokenizer normalizes them in an unknown way, or the text contains characters from U+100000 on",
                fix="remove them from the row, or use --data.control_tokens=keep",
            )
        return self._renamed.encode(self._put_names(text, shielded), add_special_tokens=add_special_tokens)

    def _put_names(self, text: str, shielded: str) -> str:
        """Replaces the template's control tokens by their private names."""
        parts, done = [], 0
        for match in self._known.every.finditer(shielded):
            if match[0] in self.tokens:
                parts += [text[done : match.start()], self._names[match[0]]]
                done = match.end()
        return "".join([*parts, text[done:]])

    @cached_property
    def _names(self) -> dict[str, str]:
        """Private names of the control tokens, of the same length, so that positions do not change."""
        return {token: chr(_FOR_TOKENS + i) * len(token) for i, token in enumerate(sorted(self.tokens))}

    @cached_property
    def _renamed(self) -> Any:
        return copy_backend(self._tokenizer, self._names)

    @cached_property
    def _exact(self) -> Any:
        return copy_backend(self._tokenizer)


def _probe(tokenizer: Tokenizer, added: re.Pattern[str]) -> _Seen:
    """Finds the added tokens in a rendered conversation."""
    seen = _Seen(set(), set(), set(), set())
    if not has_template(tokenizer):
        return seen
    for messages in (_PROBE, _PROBE[1:], _PROBE[1:3]):  # templates may refuse a system message, or a last question
        try:
            gaps = _gaps(render(tokenizer, messages), messages)
        except DataError:
            continue
        if gaps is None:
            continue
        for gap, after, before in zip(gaps, (None, *messages), (*messages, None), strict=True):
            found = added.findall(gap)
            seen.around.update(content for content in found if _BRACKETS & set(content))
            if before is not None:
                (seen.before_answer if before.role == "assistant" else seen.before_asking).update(found)
            if after is not None and after.role == "assistant":
                seen.after_answer.update(found[:1])
        break
    return seen


def _gaps(text: str, messages: Sequence[Message]) -> list[str] | None:
    """Returns the template's text before, between and after messages; None if the template moves a message."""
    gaps = []
    for message in messages:
        gap, found, text = text.partition(message.content)
        if not found:
            return None
        gaps.append(gap)
    return [*gaps, text]


def _distinct(found: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(token for each in found for token in each))


def _choose_private(tokens: Sequence[str], taken: set[str], origin: str) -> dict[str, str]:
    """Returns a private text of the same length for each control token, without the characters of the messages."""
    free = (char for char in map(chr, range(_FOR_MESSAGES, _FOR_MESSAGES + _SIZE)) if char not in taken)
    private = {token: "".join(islice(free, len(token))) for token in tokens}
    if any(len(token) != len(name) for token, name in private.items()):
        raise DataError("A message contains too many characters from U+F0000 on.", where=origin, fix="remove the row")
    return private


def _compile(contents: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that finds the longest of several texts."""
    tree: dict[str, Any] = {}
    for content in filter(None, contents):
        node = tree
        for char in content:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_branches(tree) if tree else r"(?!)")


def _branches(node: Mapping[str, Any]) -> str:
    """Returns a pattern for a prefix tree, longest match first; a plain alternation of thousands of texts is slow."""
    parts = [re.escape(char) + _branches(below) for char, below in sorted(node.items()) if char]
    pattern = f"(?:{'|'.join(parts)})" if parts else ""
    return f"{pattern}?" if parts and "" in node else pattern


def _pair(content: str) -> set[str]:
    """Returns both tags of the pair that ``<x>``, ``</x>``, ``[X]`` or ``[/X]`` belongs to; empty for other texts."""
    match = re.fullmatch(r"([<\[])/?(\w[\w ]*)([>\]])", content)
    return {f"{match[1]}{match[2]}{match[3]}", f"{match[1]}/{match[2]}{match[3]}"} if match else set()
