"""Decides what ends an answer, and collects its tokens as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ingle.data import Message, render
from ingle.errors import DataError, ModelError
from ingle.models.text_limits import num_tokens
from ingle.models.text_part import text_config

FinishReason = Literal["stop", "length"]

#: The answer of a made-up conversation, rendered to find the end-of-turn token of a chat template.
_PROBE = "ingle"


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer.

    Attributes:
        token_ids: Tokens of the answer, without the one that ended it.
        text: The answer up to a stop string, without special tokens.
        finish_reason: ``stop`` (end token or stop string) or ``length``.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class StopCriteria:
    """What ends an answer: strings and end tokens."""

    tokenizer: PreTrainedTokenizerFast
    stop: tuple[str, ...]
    end_ids: frozenset[int]

    @property
    def window(self) -> int:
        """Number of last tokens to search for stop strings: one per byte, and four for a character before them."""
        return 4 + max((len(text.encode()) for text in self.stop), default=0)

    def decode(self, ids: list[int]) -> str:
        """Returns the text of tokens without special ones."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Answer:
    """The tokens of one growing answer."""

    def __init__(self, criteria: StopCriteria) -> None:
        self._criteria = criteria
        self._ids: list[int] = []
        self._reason: FinishReason = "length"

    def add(self, token: int) -> bool:
        """Adds a token; returns whether it ended the answer."""
        stop = self._criteria.stop
        if token in self._criteria.end_ids:
            self._reason = "stop"
            return True
        self._ids.append(token)
        if stop:
            # The window decodes to the end of the text, so a match in it is a match in the text.
            tail = self._criteria.decode(self._ids[-self._criteria.window :])
            if any(text in tail for text in stop):
                self._reason = "stop"
                return True
        return False

    def finish(self) -> Generation:
        """Returns the complete answer."""
        text = self._criteria.decode(self._ids)
        cuts = [place for place in map(text.find, self._criteria.stop) if place >= 0]
        return Generation(tuple(self._ids), text[: min(cuts)] if cuts else text, self._reason)

    def settled(self) -> str:
        """Returns the text that no later token can change."""
        text = self._criteria.decode(self._ids).rstrip("\N{REPLACEMENT CHARACTER}")
        for size in range(min(len(text), max(map(len, self._criteria.stop), default=0)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._criteria.stop):
                return text[:-size]
        return text


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Returns every token that ends an answer: the model's, the tokenizer's, and the chat template's end of turn.

    Raises:
        ModelError: One of them is not in the model's vocabulary, or the chat template exceeds its limits.
    """
    found: set[int] = set()
    rows = num_tokens(model)
    for where, declared in (
        ("generation_config.json: eos_token_id", getattr(model.generation_config, "eos_token_id", None)),
        ("config.json: eos_token_id", getattr(text_config(model.config), "eos_token_id", None)),
        ("the tokenizer's eos_token", tokenizer.eos_token_id),
        ("the chat template's end of turn", _end_of_turn(tokenizer)),
    ):
        numbers = declared if isinstance(declared, list | tuple) else [] if declared is None else [declared]
        for number in numbers:
            if number == -1 and type(number) is int:
                continue  # means none in some configs
            if type(number) is not int or not 0 <= number < rows:
                raise ModelError(
                    "The token that ends an answer is not in the model's vocabulary.",
                    where=where,
                    why=f"it is {number!r}; the model has tokens from 0 to {rows - 1:,}",
                    fix="compare the file with the one that the model was published with",
                )
            found.add(number)
    return frozenset(found)


def _end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Returns the special token that directly follows an answer in the rendered template, if there is one."""
    if not tokenizer.chat_template:
        return None
    try:
        rendered = render(tokenizer, [Message("user", "?"), Message("assistant", _PROBE)])
    except DataError:
        return None  # a template may refuse this conversation
    _, _, tail = rendered.rpartition(_PROBE)
    ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
    first = ids[0] if ids else None
    known = tokenizer.added_tokens_decoder
    return first if first in known and known[first].special else None
