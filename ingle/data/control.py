"""Control tokens in what people said: text stays text.

A chat template writes control tokens around messages (``<|im_start|>``, ``</s>``).  Where a message holds the same
characters, a tokenizer makes the same tokens of them: a turn begins that nobody took.  So before a conversation is
rendered, such characters are replaced by private ones, one for one; whatever control tokens the rendering then holds
are the template's own.  For the tokenizer it is the other way round: it is a copy in which control tokens have private
names, the template's are written with these, and the message's characters are text to it.  Nothing is tokenized in
pieces, so everything around is cut as ever, and every character keeps its position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from ingle.data.backend import copy_backend
from ingle.data.template import has_template, render
from ingle.data.types import Message, Tokenizer
from ingle.errors import DataError

Policy = Literal["keep", "escape", "refuse"]

#: Where private characters for messages begin, and where private names of control tokens do; 65,534 each.
_FOR_MESSAGES, _FOR_TOKENS, _SIZE = 0xF0000, 0x100000, 0xFFFE

#: Characters that a control token has one of; templates write other added tokens as the words they are.
_BRACKETS = frozenset("<>[]{}|")

_PROBE = (Message("system", "Sys9"), Message("user", "Ask9"), Message("assistant", "Say9"), Message("user", "End9"))


@dataclass(frozen=True, slots=True)
class Shielded:
    """Messages whose control tokens are hidden from the template.

    Attributes:
        messages: With private characters for those of control tokens.
        tokens: The control tokens in them, each once.
        hidden: Private characters and what each stands for; None where nothing is hidden.
        ends_left_out: Answers that lost an end of turn of their own.
    """

    messages: tuple[Message, ...]
    tokens: tuple[str, ...] = ()
    hidden: Mapping[int, str] | None = None
    ends_left_out: int = 0

    def reveal(self, text: str) -> str:
        """The text with the characters that were hidden; of the same length."""
        return text.translate(self.hidden) if self.hidden else text


@dataclass(frozen=True, slots=True)
class _Seen:
    """Added tokens in a rendered conversation: all around messages, and in some places there."""

    around: set[str]
    before_asking: set[str]
    before_answer: set[str]
    after_answer: set[str]


@dataclass(frozen=True, slots=True)
class _Known:
    """What there is to find.

    Attributes:
        tokens: The control tokens.
        ends: Those that end an answer.
        every: Finds all added tokens.
        any: Finds control tokens.
        folded: The tokenizer's normalizer, and what finds control tokens in a normalized text; None where all of them
            are matched as they are written.
    """

    tokens: frozenset[str]
    ends: tuple[str, ...]
    every: re.Pattern[str]
    any: re.Pattern[str]
    folded: tuple[Callable[[str], str], re.Pattern[str]] | None


class ControlTokens:
    """What is a control token to a tokenizer and its template, and what to do with those in messages.

    Control tokens are the special tokens, and the added tokens that the chat template writes around messages.
    Tags in pairs (``<think>`` and ``</think>``) are not: templates and data put them into messages to be tokens.
    White space never is.

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
        if backend is None:  # a slow tokenizer, which is refused elsewhere
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
        # [INST] and [/INST] are a pair as well; what stands before a question, and not before an answer, is no thought.
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
        """What a tokenizer would make control tokens of, in order."""
        found: list[str] = self._known.any.findall(text)
        if not found and self._known.folded is not None:
            normalize, pattern = self._known.folded
            found = pattern.findall(normalize(text))
        return found

    def shield(self, messages: Sequence[Message], origin: str) -> Shielded:
        """The messages as the template may see them.

        Args:
            messages: A conversation.
            origin: ``file:line``, for the error.

        Raises:
            DataError: There is a control token and ``data.control_tokens`` is ``refuse``.
        """
        found = [self.find(message.content) for message in messages]
        if not any(found):
            return Shielded(tuple(messages))
        if self.policy == "keep":
            return Shielded(tuple(messages), _distinct(found))
        if self.policy == "refuse":
            number = next(i for i, each in enumerate(found) if each)
            raise DataError(
                "A message holds a control token.",
                where=origin,
                why=f"message {number + 1} ({messages[number].role}) holds {found[number][0]!r}",
                fix="remove it from the row, or data.control_tokens=escape, which reads it as text",
            )
        kept = tuple(self._without_end(message) for message in messages)
        ends_left_out = sum(before is not after for before, after in zip(messages, kept, strict=True))
        tokens = _distinct(self.find(message.content) for message in kept)
        if not tokens:
            return Shielded(kept, ends_left_out=ends_left_out)
        private = _choose_private(sorted(self.tokens & set(tokens)), kept, origin)
        return Shielded(
            tuple(Message(m.role, self._known.any.sub(lambda match: private[match[0]], m.content)) for m in kept),
            tokens,
            {ord(theirs): own for token, name in private.items() for own, theirs in zip(token, name, strict=True)},
            ends_left_out,
        )

    def _without_end(self, message: Message) -> Message:
        """An answer without the end of turn that the template writes anyway."""
        if message.role != "assistant":
            return message
        content = message.content
        while end := next((end for end in self._known.ends if content.rstrip().endswith(end)), None):
            content = content.rstrip().removesuffix(end)
        return message if content == message.content else Message(message.role, content)

    def encode(self, text: str, shielded: str, origin: str, *, add_special_tokens: bool) -> Any:
        """The encoding of a text in which only the template's control tokens are tokens; offsets are those of ``text``.

        Args:
            text: As it is to be read.
            shielded: The same with the control tokens of messages hidden.
            origin: ``file:line``, for the error.
            add_special_tokens: Whether the tokenizer adds its own.

        Raises:
            DataError: The tokenizer cannot tell the two kinds apart.
        """
        hidden = self._renamed.encode(self._put_names(shielded, shielded), add_special_tokens=add_special_tokens)
        usual = self._exact.encode(shielded, add_special_tokens=add_special_tokens)
        if (hidden.ids, hidden.offsets) != (usual.ids, usual.offsets):
            raise DataError(
                "The control tokens in a message cannot be told from those of the chat template.",
                where=origin,
                why="this tokenizer reads them in a way of its own, or the text holds characters from U+100000 on",
                fix="remove them from the row, or data.control_tokens=keep",
            )
        return self._renamed.encode(self._put_names(text, shielded), add_special_tokens=add_special_tokens)

    def _put_names(self, text: str, shielded: str) -> str:
        """The text with private names where the template has written control tokens."""
        parts, done = [], 0
        for match in self._known.every.finditer(shielded):
            if match[0] in self.tokens:
                parts += [text[done : match.start()], self._names[match[0]]]
                done = match.end()
        return "".join([*parts, text[done:]])

    @cached_property
    def _names(self) -> dict[str, str]:
        """Private names of the control tokens, as long as these, so that positions stay."""
        return {token: chr(_FOR_TOKENS + i) * len(token) for i, token in enumerate(sorted(self.tokens))}

    @cached_property
    def _renamed(self) -> Any:
        return copy_backend(self._tokenizer, self._names)

    @cached_property
    def _exact(self) -> Any:
        return copy_backend(self._tokenizer)


def _probe(tokenizer: Tokenizer, added: re.Pattern[str]) -> _Seen:
    """Where in a rendered conversation there are added tokens."""
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
    """What a template has written before, between and after messages; None when it has moved one."""
    gaps = []
    for message in messages:
        gap, found, text = text.partition(message.content)
        if not found:
            return None
        gaps.append(gap)
    return [*gaps, text]


def _distinct(found: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(token for each in found for token in each))


def _choose_private(tokens: Sequence[str], messages: Sequence[Message], origin: str) -> dict[str, str]:
    """For each control token a private text of the same length whose characters no message holds."""
    taken = {char for message in messages for char in message.content}
    free = (char for char in map(chr, range(_FOR_MESSAGES, _FOR_MESSAGES + _SIZE)) if char not in taken)
    private = {token: "".join(islice(free, len(token))) for token in tokens}
    if any(len(token) != len(name) for token, name in private.items()):
        raise DataError("A message holds too many characters from U+F0000 on.", where=origin, fix="remove the row")
    return private


def _compile(contents: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of several texts."""
    tree: dict[str, Any] = {}
    for content in filter(None, contents):
        node = tree
        for char in content:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_branches(tree) if tree else r"(?!)")


def _branches(node: Mapping[str, Any]) -> str:
    """A pattern for the texts in a tree of characters, the longest first; an alternation of thousands is slow."""
    parts = [re.escape(char) + _branches(below) for char, below in sorted(node.items()) if char]
    pattern = f"(?:{'|'.join(parts)})" if parts else ""
    return f"{pattern}?" if parts and "" in node else pattern


def _pair(content: str) -> set[str]:
    """Both halves of the pair of tags that ``<x>``, ``</x>``, ``[X]`` or ``[/X]`` belongs to; else nothing."""
    match = re.fullmatch(r"([<\[])/?(\w[\w ]*)([>\]])", content)
    return {f"{match[1]}{match[2]}{match[3]}", f"{match[1]}/{match[2]}{match[3]}"} if match else set()
