"""Documents to ids: text, the spans that carry loss, and their way through the tokenizer.

A document is tokenized once as a whole.  A token carries loss when its first character lies in a supervised
span; so a token that straddles the border of a prompt belongs to the prompt.  Masks come from character
positions and lengths, never from ids: pad and end-of-text may share an id without harm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data.backend import copy_backend
from ingle.data.control import ControlTokens
from ingle.data.template import (
    ANSWER,
    Answer,
    TrainOn,
    has_template,
    locate_answers,
    read_conversation,
    split_prompt,
)
from ingle.data.types import Example, Ids, Mask, Message, Tokenizer

#: Longer texts are tokenized in pieces cut at line ends, which bounds memory; see :func:`cut_text`.
PIECE_CHARS = 1 << 18
_PIECES_AT_ONCE = 8

#: A line end at which every common pre-tokenizer cuts too: a single newline between two words.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")


@dataclass(frozen=True, slots=True)
class Document:
    """A text to be tokenized.

    Attributes:
        origin: ``file:line``.
        text: All of it.
        answers: Where the assistant speaks; None for plain text, where nobody does.
        everything: Every token carries loss, not only the answers.
        chat: Rendered by a chat template, which brings its own special tokens.  Otherwise the tokenizer puts
            its own (BOS) before the text, and the end-of-text token is put after it.
        shielded: The text with the control tokens of messages hidden; None where it holds none that must stay text.
        control: The control tokens that messages hold.
        ends_left_out: Answers that lost an end of turn of their own.
        remarks: Of the template.
    """

    origin: str
    text: str
    answers: tuple[Answer, ...] | None = None
    everything: bool = False
    chat: bool = False
    shielded: str | None = None
    control: tuple[str, ...] = ()
    ends_left_out: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenized document.

    Attributes:
        ids: int32 [T].
        supervised: bool [T]; the first is always False, since nothing predicts it.
        open_turns: Trained turns after which no end-of-turn token is supervised.
        straddled: Whether a token lies across the border of prompt and answer.
        recut: Whether the white space at a prompt's end becomes other tokens when nothing follows it.
    """

    ids: Ids
    supervised: Mask
    open_turns: int = 0
    straddled: bool = False
    recut: bool = False


def draw_document(
    example: Example,
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn,
    system: str | None,
    control: ControlTokens | None = None,
) -> Document | str:
    """The document of an example, or the reason to skip it.

    Args:
        example: A row.
        tokenizer: With or without a chat template.
        train_on: As ``data.train_on``.
        system: As ``data.system``.
        control: What to do with control tokens in messages; by default they are read as text.

    Raises:
        DataError: The chat template is missing, refuses the conversation or cannot be masked; or a message holds a
            control token that is refused.
        ModelError: The chat template takes too much time or memory.
    """
    if example.text is not None:
        return Document(example.origin, example.text, everything=True) if example.text.strip() else "empty text"
    control = control or ControlTokens(tokenizer)
    if not example.messages and not has_template(tokenizer):
        return _draw_pair(example, control, everything=train_on == "all")
    messages = list(read_conversation(example, system))
    if train_on != "all":
        while messages and messages[-1].role != "assistant":
            messages.pop()  # nothing after the last answer carries loss or is seen by a token that does
    hidden = control.shield(messages, example.origin)
    if train_on != "all":
        trained = [message for message in hidden.messages if message.role == "assistant"]
        if not trained:
            return "no assistant turn"
        if not any(message.content.strip() for message in trained[-1 if train_on == "last" else 0 :]):
            return "empty answer"
    found = locate_answers(tokenizer, hidden.messages, train_on=train_on, origin=example.origin)
    return Document(
        example.origin,
        hidden.reveal(found.text),
        found.answers,
        everything=train_on == "all",
        chat=True,
        shielded=found.text if hidden.hidden is not None else None,
        control=hidden.tokens,
        ends_left_out=hidden.ends_left_out,
        remarks=found.remarks,
    )


def _draw_pair(example: Example, control: ControlTokens, *, everything: bool) -> Document | str:
    """Prompt and completion as one text, without a chat template."""
    prompt, completion = split_prompt(example)
    hidden = control.shield((Message("user", prompt), Message("assistant", completion)), example.origin)
    shown = "".join(message.content for message in hidden.messages)
    if not hidden.messages[1].content.strip():
        return "empty answer"
    answer = Answer(len(prompt), len(shown), len(shown))
    return Document(
        example.origin,
        hidden.reveal(shown),
        (answer,),
        everything=everything,
        shielded=shown if hidden.hidden is not None else None,
        control=hidden.tokens,
        ends_left_out=hidden.ends_left_out,
    )


def cut_text(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a long text into pieces of about ``size`` characters whose tokens joined are those of the whole.

    Cuts are made after a single newline between two words, where byte-level BPE pre-tokenizers part words
    anyway; only where ``size`` characters hold none is a cut made elsewhere.
    """
    start = 0
    while len(text) - start > size:
        cut = None
        for match in _CUT.finditer(text, start + size // 2, start + size):
            cut = match.start()
        if cut is None:
            cut = max(text.rfind(" ", start + size // 2, start + size), start + size // 2)
        yield text[start:cut]
        start = cut
    yield text[start:]


class TextEncoder:
    """Tokenizes documents in batches and masks them."""

    def __init__(self, tokenizer: Tokenizer, control: ControlTokens | None = None) -> None:
        self._private = control or ControlTokens(tokenizer)
        self._backend = copy_backend(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        added = set(self._backend.get_added_tokens_decoder()) | set(tokenizer.all_special_ids)
        self._control = np.array(sorted(added), dtype=np.int32)
        self._recut: dict[str, bool] = {}

    @property
    def has_eos(self) -> bool:
        """Whether there is a token to end a text with."""
        return self._eos is not None

    @property
    def control_ids(self) -> Ids:
        """Ids of special and added tokens, ascending: those that can end a turn."""
        return self._control

    def encode(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """Ids and masks, in order."""
        plain = iter(self._encode_plain([d.text for d in documents if _is_plain(d)]))
        spanned = {chat: iter(self._encode_spanned(documents, chat)) for chat in (False, True)}
        for document in documents:
            if _is_plain(document):
                yield self._close_text(next(plain))
                continue
            if document.shielded is None:
                encoding = next(spanned[document.chat])
            else:
                encoding = self._private.encode(
                    document.text, document.shielded, document.origin, add_special_tokens=not document.chat
                )
            yield self._mask_chat(encoding, document) if document.chat else self._mask_pair(encoding, document)

    def _encode_spanned(self, documents: Sequence[Document], chat: bool) -> Sequence[Any]:
        """Encodings with positions, of those documents that are read as they stand."""
        texts = [d.text for d in documents if d.chat == chat and d.shielded is None and not _is_plain(d)]
        encodings: Sequence[Any] = self._backend.encode_batch(texts, add_special_tokens=not chat)
        return encodings

    def _encode_plain(self, texts: list[str]) -> Iterator[Ids]:
        """Ids of plain texts; what the tokenizer says about a long one is held for some pieces at a time only."""
        short = [text for text in texts if len(text) <= PIECE_CHARS]
        encodings = iter(self._backend.encode_batch_fast(short))
        for text in texts:
            yield self._open(next(encodings)) if len(text) <= PIECE_CHARS else self._encode_long(text)

    def _encode_long(self, text: str) -> Ids:
        pieces = cut_text(text)
        parts = [self._open(self._backend.encode_batch_fast([next(pieces)])[0])]
        while batch := list(islice(pieces, _PIECES_AT_ONCE)):
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            parts += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return np.concatenate(parts)

    def _open(self, encoding: Any) -> Ids:
        ids = np.array(encoding.ids, dtype=np.int32)
        return ids[self._find_text(ids)]

    def _find_text(self, ids: Ids) -> slice:
        """All but a second BOS, and the EOS that some tokenizers add themselves (it is put there anyway)."""
        start, stop = 0, len(ids)
        if stop > 1 and self._bos is not None and ids[0] == self._bos == ids[1]:
            start = 1
        while stop - start > 1 and self._eos is not None and ids[stop - 1] == self._eos:
            stop -= 1
        return slice(start, stop)

    def _close_text(self, ids: Ids) -> Encoded:
        supervised = np.ones(len(ids), dtype=np.bool_)
        ids, supervised, is_open = self._close(ids, supervised)
        return Encoded(ids, supervised, int(is_open))

    def _close(self, ids: Ids, supervised: Mask) -> tuple[Ids, Mask, bool]:
        """With the end-of-text token, which carries loss, after the text; True when there is no such token."""
        if self._eos is not None:
            ids, supervised = np.append(ids, np.int32(self._eos)), np.append(supervised, True)
        supervised[:1] = False
        return ids, supervised, self._eos is None

    def _mask_pair(self, encoding: Any, document: Document) -> Encoded:
        ids, offsets = _as_arrays(encoding)
        text = self._find_text(ids)
        ids, offsets = ids[text], offsets[text]
        assert document.answers is not None, "plain text has no border"
        (answer,) = document.answers
        supervised = (offsets[:, 0] >= answer.start) | document.everything
        ids, supervised, is_open = self._close(ids, supervised)
        return Encoded(
            ids, supervised, int(is_open), _straddles(offsets, answer.start), self._is_recut(document.text, answer)
        )

    def _mask_chat(self, encoding: Any, document: Document) -> Encoded:
        ids, offsets = _as_arrays(encoding)
        starts = offsets[:, 0]
        supervised = np.full(len(ids), document.everything, dtype=np.bool_)
        open_turns, straddled, recut, is_open = 0, False, False, False
        for answer in document.answers or ():
            after = np.flatnonzero((starts >= answer.content_end) & (starts < answer.end))
            ends = after[np.isin(ids[after], self._control)]
            is_open = len(ends) == 0
            open_turns += is_open
            stop = answer.end if is_open else offsets[ends[0], 1]
            supervised |= (starts >= answer.start) & (starts < stop)
            straddled = straddled or _straddles(offsets, answer.start)
            recut = recut or self._is_recut(document.text, answer)
        if is_open:  # the template does not end the last turn, so the model would never learn to stop
            ids, supervised, is_open = self._close(ids, supervised)
            open_turns -= not is_open
        supervised[:1] = False
        return Encoded(ids, supervised, open_turns, straddled, recut)

    def _is_recut(self, text: str, answer: Answer) -> bool:
        prompt = text[: answer.start]
        space = prompt[len(prompt.rstrip()) :]
        if len(space) < 2:
            return False
        if space not in self._recut:
            alone = self._backend.encode(space, add_special_tokens=False).ids
            self._recut[space] = (
                self._backend.encode(space + ANSWER, add_special_tokens=False).ids[: len(alone)] != alone
            )
        return self._recut[space]


def _is_plain(document: Document) -> bool:
    return document.everything and not document.chat and document.shielded is None


def _as_arrays(encoding: Any) -> tuple[Ids, npt.NDArray[np.int64]]:
    return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _straddles(offsets: npt.NDArray[np.int64], border: int) -> bool:
    return bool(np.any((offsets[:, 0] < border) & (offsets[:, 1] > border)))
