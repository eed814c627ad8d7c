"""The text of an answer as its tokens come, and what ends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer.

    Attributes:
        token_ids: Tokens of the answer, without the one that ended it.
        text: The answer, cut before a stop string, special tokens left out.
        finish_reason: ``stop`` (end token or stop string) or ``length``.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Rules:
    """What ends an answer."""

    tokenizer: PreTrainedTokenizerFast
    stop: tuple[str, ...]
    end_ids: frozenset[int]

    @property
    def window(self) -> int:
        """Tokens that may hold a stop string: a token is at least a byte, and a character may begin before it."""
        return 4 + max((len(text.encode()) for text in self.stop), default=0)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Answer:
    """The tokens of one answer as they come."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._ids: list[int] = []
        self._reason: FinishReason = "length"

    def add(self, token: int) -> bool:
        """Takes a token; true when the answer is over."""
        if token in self._rules.end_ids:
            self._reason = "stop"
            return True
        self._ids.append(token)
        if self._rules.stop:
            tail = self._rules.decode(self._ids[-self._rules.window :])
            # The window decodes to the end of the text, so a hit in it is one in the whole.
            if any(text in tail for text in self._rules.stop):
                self._reason = "stop"
                return True
        return False

    def finish(self) -> Generation:
        """The whole answer."""
        text = self._rules.decode(self._ids)
        cuts = [place for place in map(text.find, self._rules.stop) if place >= 0]
        return Generation(tuple(self._ids), text[: min(cuts)] if cuts else text, self._reason)

    def settled(self) -> str:
        """The text that no later token can change."""
        text = self._rules.decode(self._ids)
        text = text.rstrip("�") if text.endswith("�") else text
        for size in range(min(len(text), max(map(len, self._rules.stop), default=0)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._rules.stop):
                return text[:-size]
        return text
