"""Tokenizes the answers of a row, each with its prompt, and cuts what is too long.

A prompt that is too long loses its oldest messages, and its first tokens if a single message is too long; all answers
of a row keep the same prompt. Answers are cut with ``too_long: truncate`` only: they then have no end of turn, and are
marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ingle.data.control import ControlTokens
from ingle.data.encoding import Document, Encoded, TextEncoder, make_document
from ingle.data.preference_rows import shared_length
from ingle.data.row_encoder import Counts, Piece, TokenOptions
from ingle.data.sandbox import Sandbox
from ingle.data.template import has_template
from ingle.data.types import Example, Ids, Mask, Tokenizer
from ingle.errors import DataError

#: A prompt that is cut keeps this share of the room, unless it is shorter.
_LEAST_SHARE = 0.25

_NO_LOSS = "No supervised token."
PROMPTS_CUT = "Prompts that are too long lose their oldest messages, or their first tokens."


class AnswerEncoder(Protocol):
    """Tokenizes answers with their prompts."""

    def encode(self, rows: Sequence[Sequence[Example]]) -> Iterator[tuple[list[Sequence[Piece] | str], Counts]]:
        """Yields, for every row, the documents of each answer, or why it is left out, and what is cut or unusual.

        Args:
            rows: The answers of each row.
        """


@dataclass(frozen=True, slots=True)
class Room:
    """How many tokens of a prompt and its answers there is room for.

    Attributes:
        limit: Tokens of a prompt with one answer.
        cuts_prompts: Whether prompts may be cut.
        cuts_answers: Whether answers may be cut.
    """

    limit: int
    cuts_prompts: bool
    cuts_answers: bool

    @classmethod
    def of(cls, options: TokenOptions, num_special: int = 0) -> Room:
        """Returns the room of a document with ``num_special`` special tokens."""
        cuts = options.too_long
        return cls(options.max_seq_len - num_special, cuts != "drop", cuts == "truncate")

    def least(self, prompt: int) -> int:
        """Returns the tokens that a prompt of ``prompt`` tokens keeps."""
        return min(prompt, max(int(self.limit * _LEAST_SHARE), 1)) if self.cuts_prompts else prompt

    def holds(self, prompt: int, answer: int) -> bool:
        """Returns whether an answer can be kept, perhaps cut, behind its prompt, perhaps cut."""
        return self.cuts_answers or self.least(prompt) + answer <= self.limit


class ConversationAnswers:
    """Answers of a causal model: prompt and answer are one document, tokenized exactly as ``sft`` does.

    Args:
        tokenizer: The model's tokenizer.
        options: How rows become tokens.
    """

    def __init__(self, tokenizer: Tokenizer, options: TokenOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._control = ControlTokens(tokenizer, options.control_tokens)
        self._encoder = TextEncoder(tokenizer, self._control)
        self._sandbox = Sandbox(tokenizer)
        self._room = Room.of(options)
        self._ends = self._encoder.control_ids
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos: int | None = None if bos == eos else bos

    def encode(self, rows: Sequence[Sequence[Example]]) -> Iterator[tuple[list[Sequence[Piece] | str], Counts]]:
        """Yields the document of each answer; see :class:`AnswerEncoder`.

        Raises:
            DataError: The template refuses a row or cannot be masked, or an answer does not end in one end of turn.
            ModelError: The chat template takes too much time or memory.
        """
        turns = list(map(_count_answers, rows))
        for row, own, (documents, found) in zip(rows, turns, self._tokenize(rows, turns), strict=True):
            counts = Counts()
            _add_remarks(documents, found, counts)
            faults = [self._find_fault(text, each) for text, each in zip(row, found, strict=True)]
            for fault, text in zip(faults, row, strict=True):
                if fault is not None:
                    self._refuse(fault, text, counts)
            yield self._fit(row, own, found, counts), counts

    def _tokenize(
        self, rows: Sequence[Sequence[Example]], turns: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[Document | str], list[Encoded | str]]]:
        """Yields the documents of each row and their tokens, or why an answer is left out."""
        with self._sandbox:
            made = [self._make_documents(row, own) for row, own in zip(rows, turns, strict=True)]
        encoded = self._encoder.encode([each for row in made for each in row if not isinstance(each, str)])
        for row in made:
            found: list[Encoded | str] = []
            for each in row:
                tokens = each if isinstance(each, str) else next(encoded)
                is_vain = not isinstance(tokens, str) and not tokens.supervised.any()
                found.append(_NO_LOSS if is_vain else tokens)
            yield row, found

    def _make_documents(self, row: Sequence[Example], turns: Sequence[int]) -> list[Document | str]:
        """Returns the document of each answer, of which the last ``turns`` turns of the assistant carry loss."""
        documents: list[Document | str] = []
        for text, count in zip(row, turns, strict=True):
            if text.messages and not has_template(self._tokenizer):
                raise DataError(
                    "The rows are conversations, but the tokenizer has no chat template.",
                    where=text.origin,
                    fix="--model.chat_template=FILE with a Jinja template; transcripts can also be read as plain text "
                    "with data.sources: layout: preference",
                )
            document = make_document(
                text,
                self._tokenizer,
                train_on="last" if count == 1 else "assistant",
                system=self._options.system,
                control=self._control,
                sandbox=self._sandbox,
            )
            if not isinstance(document, str) and count > 1:
                document = replace(document, answers=(document.answers or ())[-count:])
            documents.append(document)
        return documents

    def _find_fault(self, text: Example, found: Encoded | str) -> str | None:
        """Returns what is wrong with the special tokens of a document; None if nothing is.

        A text begins with at most one BOS. Within it, BOS only follows the end of a turn, as in some templates. Every
        trained answer ends in an end of turn, and contains no other token of its id.
        """
        if isinstance(found, str):
            return None
        ids, supervised = found.ids, found.supervised
        inner = np.flatnonzero(ids[1:] == self._bos) + 1 if self._bos is not None else np.zeros(0, np.int64)
        if len(inner):
            before = ids[inner - 1]
            if (supervised[inner] | (before == self._bos) | ~np.isin(before, self._ends)).any():
                return "a text contains the token that begins a text more than once"
        for start, stop in _runs(supervised):
            end = ids[stop - 1]
            if end not in self._ends:
                return "an answer has no end-of-turn token, so a model would never learn to stop"
            if np.count_nonzero(ids[start:stop] == end) > 1:
                return "an answer contains its end-of-turn token more than once"
        return None

    def _refuse(self, fault: str, text: Example, counts: Counts) -> None:
        if self._options.control_tokens == "keep":
            counts.remarks.add(f"Special tokens: {fault}.", text.origin)
            return
        raise DataError(
            "The special tokens of an answer are wrong.",
            where=text.origin,
            why=fault,
            fix="another template: --model.chat_template=FILE, or --data.control_tokens=escape",
        )

    def _fit(
        self, row: Sequence[Example], turns: Sequence[int], found: Sequence[Encoded | str], counts: Counts
    ) -> list[Sequence[Piece] | str]:
        """Returns the documents of a row, cut to ``max_seq_len`` where they are too long."""
        room = self._room
        kept = {i: each for i, each in enumerate(found) if not isinstance(each, str)}
        if all(len(each.ids) <= room.limit for each in kept.values()):
            return [each if isinstance(each, str) else (_piece(each.ids, each.supervised),) for each in found]
        for i, each in list(kept.items()):
            if not room.holds(_first(each), len(each.ids) - _first(each)):
                del kept[i]
        reason = f"Longer than data.max_seq_len = {room.limit}."
        result: list[Sequence[Piece] | str] = [each if isinstance(each, str) else reason for each in found]
        if not kept:
            return result
        shorter = self._drop_messages([row[i] for i in kept], [turns[i] for i in kept], list(kept.values()))
        cut = _cut_prompts([(each.ids, each.supervised) for each in shorter], room, self._bos)
        for (i, whole), (ids, supervised) in zip(kept.items(), cut, strict=True):
            is_cut = len(ids) > room.limit
            result[i] = (_piece(ids[: room.limit], supervised[: room.limit], truncated=is_cut),)
            lost = len(whole.ids) - min(len(ids), room.limit)
            counts.truncated_documents += lost > 0
            counts.truncated_tokens += lost
        if any(len(each.ids) > room.limit for each in kept.values()):
            counts.remarks.add(PROMPTS_CUT, row[0].origin)
        return result

    def _drop_messages(self, row: Sequence[Example], turns: Sequence[int], found: list[Encoded]) -> list[Encoded]:
        """Returns the answers without as many of the oldest messages as needed; a system message stays.

        What is left begins with a question, and at least the last question stays.
        """
        messages = [text.messages for text in row]
        first = messages[0]
        head = int(bool(first) and first[0].role in ("system", "developer"))
        end = shared_length(messages) if len(row) > 1 else len(first) - 1
        starts = [i for i in range(head + 1, end) if first[i].role == "user"]
        low, high = 0, len(starts) - 1
        if not starts or self._fits(found):
            return found

        def shorten(start: int) -> list[Encoded]:
            texts = [replace(text, messages=(*text.messages[:head], *text.messages[start:])) for text in row]
            ((_, tokens),) = self._tokenize([texts], [turns])
            return [each for each in tokens if not isinstance(each, str)]

        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(shorten(starts[middle])) else (middle + 1, high)
        return shorten(starts[low])

    def _fits(self, found: Sequence[Encoded]) -> bool:
        return all(len(each.ids) <= self._room.limit for each in found)


def _count_answers(row: Sequence[Example]) -> list[int]:
    """Returns how many last turns of the assistant are the answer in each text: those after the common messages."""
    turns = [text.messages for text in row]
    if len(row) == 1 or not all(turns):
        return [1] * len(row)
    shared = shared_length(turns)
    counts = [sum(turn.role == "assistant" for turn in each[shared:]) for each in turns]
    return [max(count, 1) for count in counts] if all(counts) else [1] * len(row)


def _add_remarks(documents: Sequence[Document | str], found: Sequence[Encoded | str], counts: Counts) -> None:
    """Counts the remarks on a row once, whatever the number of its answers."""
    pairs = zip(documents, found, strict=True)
    made = [(d, e) for d, e in pairs if not isinstance(d, str) and not isinstance(e, str)]
    for remark in dict.fromkeys(remark for d, e in made for remark in d.remarks + e.remarks):
        counts.remarks.add(remark, made[0][0].origin)
    for token in dict.fromkeys(token for d, _ in made for token in d.control):
        counts.control_tokens.add(token, made[0][0].origin)


def _first(encoded: Encoded) -> int:
    """Returns the place of the first token of an answer."""
    return int(np.argmax(encoded.supervised))


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """Returns where consecutive marked tokens start and stop."""
    changes = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return list(zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True))


def _cut_prompts(answers: Sequence[tuple[Ids, Mask]], room: Room, bos: int | None) -> list[tuple[Ids, Mask]]:
    """Returns documents without as many first tokens of their prompts as needed; BOS stays."""
    prompt = min(int(np.argmax(mask)) for _, mask in answers)
    lost = min(max(len(ids) for ids, _ in answers) - room.limit, prompt - room.least(prompt))
    if lost <= 0:
        return list(answers)
    start = int(answers[0][0][0] == bos)
    kept = [np.r_[0:start, start + lost : len(ids)] for ids, _ in answers]
    return [(ids[places], mask[places]) for (ids, mask), places in zip(answers, kept, strict=True)]


def _piece(ids: Ids, supervised: Mask, *, truncated: bool = False) -> Piece:
    return Piece(ids, supervised, document_columns={"truncated": np.int8(truncated)})
