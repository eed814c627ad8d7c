"""Answers of encoders and encoder-decoders, which read plain texts without a chat template.

- A model with a head reads prompt and answer as a pair of texts with its special tokens.
- An encoder-decoder that writes answers reads the prompt as its source, and each answer is a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.config.objective import FAMILY
from ingle.data.backend import copy_backend
from ingle.data.control import ControlTokens
from ingle.data.encode_answers import PROMPTS_CUT, Room
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.special_tokens import read_special_tokens, read_target_tokens
from ingle.data.template import read_conversation
from ingle.data.types import Example, Ids, Message, Tokenizer

#: Who speaks in a conversation of several turns.
_SPEAKERS = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}


class TextAnswers:
    """Tokenizes prompts and answers apart, each with the special tokens of its place.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        self._options = options
        self._control = ControlTokens(tokenizer, options.control_tokens)
        self._backend = copy_backend(tokenizer)
        self._alone, self._pair = (read_special_tokens(tokenizer, self._backend, count) for count in (1, 2))
        self._has_target = FAMILY[options.objective] != "reward"
        if self._has_target:
            self._source = self._alone._replace(types=())
            self._target = read_target_tokens(tokenizer)

    def encode(self, rows: Sequence[Sequence[Example]]) -> Iterator[tuple[list[Sequence[Piece] | str], Counts]]:
        """Yields the document of each answer, or its source and its target; see ``AnswerEncoder``."""
        fit = self._fit_targets if self._has_target else self._fit_pairs
        for row in rows:
            counts = Counts()
            texts = [write_prompt(text, self._options.system) for text in row]
            prompts, answers = (
                [self._read(part, row[0].origin, counts) for part in parts] for parts in zip(*texts, strict=True)
            )
            yield fit(prompts, answers, row[0].origin, counts), counts

    def _read(self, text: str, origin: str, counts: Counts) -> Ids:
        """Returns the tokens of a text, in which control tokens are text unless the options keep them."""
        hidden = self._control.shield((Message("user", text),), origin)
        for token in hidden.tokens:
            counts.control_tokens.add(token, origin)
        if hidden.hidden is None:
            encoding = self._backend.encode(text, add_special_tokens=False)
        else:
            encoding = self._control.encode(text, hidden.messages[0].content, origin, add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def _fit_pairs(
        self, prompts: Sequence[Ids], answers: Sequence[Ids], origin: str, counts: Counts
    ) -> list[Sequence[Piece] | str]:
        """Returns one document for each answer: the prompt and the answer with the special tokens of a pair."""
        room = Room.of(self._options, self._pair.num_tokens)
        faults = [self._find_fault(room, len(p), len(a)) for p, a in zip(prompts, answers, strict=True)]
        longest = max((len(a) for a, fault in zip(answers, faults, strict=True) if fault is None), default=0)
        found: list[Sequence[Piece] | str] = []
        for prompt, answer, fault in zip(prompts, answers, faults, strict=True):
            if fault is not None:
                found.append(fault)
                continue
            size = min(len(prompt), max(room.limit - longest, room.least(len(prompt))))
            kept, said = prompt[len(prompt) - size :], answer[: room.limit - size]
            _count_cut(len(prompt) - size, len(answer) - len(said), origin, counts)
            special, parts = (self._pair, (kept, said)) if len(kept) else (self._alone, (said,))
            document, columns = special.wrap(*parts)
            supervised = np.zeros(len(document), np.bool_)
            stop = len(document) - len(special.parts[-1])
            supervised[stop - len(said) : stop] = True
            found.append((_piece(document, supervised, columns=columns, truncated=len(said) < len(answer)),))
        return found

    def _fit_targets(
        self, prompts: Sequence[Ids], answers: Sequence[Ids], origin: str, counts: Counts
    ) -> list[Sequence[Piece] | str]:
        """Returns a source and a target for each answer; a target that is cut loses its end."""
        options = self._options
        room, cuts_prompts = options.max_seq_len - self._source.num_tokens, options.too_long != "drop"
        found: list[Sequence[Piece] | str] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            target, _ = self._target.wrap(answer)
            fault = None if len(answer) else "Empty answer."
            if not len(prompt) + self._source.num_tokens:
                fault = "Empty source."
            if fault is None and len(target) > options.max_target_len and options.too_long != "truncate":
                fault = f"Longer than data.max_target_len = {options.max_target_len}."
            if fault is None and len(prompt) > room and not cuts_prompts:
                fault = f"Longer than data.max_seq_len = {options.max_seq_len}."
            if fault is not None:
                found.append(fault)
                continue
            source, _ = self._source.wrap(prompt[max(len(prompt) - room, 0) :])
            said = target[: options.max_target_len]
            _count_cut(max(len(prompt) - room, 0), len(target) - len(said), origin, counts)
            is_cut = len(said) < len(target)
            found.append(
                (
                    _piece(source, np.zeros(len(source), np.bool_), "source", truncated=is_cut),
                    _piece(said, np.ones(len(said), np.bool_), "target", truncated=is_cut),
                )
            )
        return found

    def _find_fault(self, room: Room, prompt: int, answer: int) -> str | None:
        """Returns why an answer is left out; None if it is not."""
        if not answer:
            return "Empty answer."
        if prompt + answer <= room.limit or room.holds(prompt, answer):
            return None
        return f"Longer than data.max_seq_len = {self._options.max_seq_len}."


def write_prompt(text: Example, system: str | None) -> tuple[str, str]:
    """Returns the prompt and the answer of an example as plain texts.

    A single question stays as it is, after a system message if there is one; the turns of a longer conversation begin
    with who speaks.
    """
    if text.completion is not None and text.prompt is not None:
        return (text.prompt if system is None else f"{system}\n\n{text.prompt}"), text.completion
    turns = list(read_conversation(text, system))
    while turns and turns[-1].role != "assistant":
        turns.pop()
    if not turns:
        return "", ""
    *before, answer = turns
    if sum(turn.role not in ("system", "developer") for turn in before) <= 1:
        return "\n\n".join(turn.written for turn in before), answer.written
    return "\n\n".join(f"{_SPEAKERS[turn.role]}: {turn.written}" for turn in before), answer.written


def _count_cut(prompt: int, answer: int, origin: str, counts: Counts) -> None:
    counts.truncated_documents += prompt + answer > 0
    counts.truncated_tokens += prompt + answer
    if prompt:
        counts.remarks.add(PROMPTS_CUT, origin)


def _piece(
    ids: Ids,
    supervised: npt.NDArray[np.bool_],
    name: str = "",
    *,
    columns: Mapping[str, npt.NDArray[Any]] | None = None,
    truncated: bool = False,
) -> Piece:
    return Piece(ids, supervised, name, columns or {}, {"truncated": np.int8(truncated)})
