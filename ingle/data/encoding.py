"""Tokenizes documents and masks the tokens that carry loss.

A document is tokenized as one text. A token carries loss if its first character is in a supervised span, so a token
that spans prompt and answer belongs to the prompt. Masks are computed from character positions, never from ids, because
pad and end-of-text may share an id.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.data.backend import copy_backend
from ingle.data.control import ControlTokens, Shielded
from ingle.data.sandbox import Sandbox
from ingle.data.template import (
    ANSWER,
    Answer,
    Rendering,
    TrainOn,
    has_template,
    locate_answers,
    read_conversation,
    split_prompt,
)
from ingle.data.token_places import OffsetPlaces, Places, TokenLengths
from ingle.data.types import IGNORE_INDEX, Example, Ids, Mask, Message, Span, Tokenizer

#: Longer texts are tokenized in pieces, which bounds memory; see :func:`cut_text`.
PIECE_CHARS = 1 << 18
_PIECES_AT_ONCE = 8

#: A single newline between two words: every common pre-tokenizer splits there too.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")

#: Remarks on documents; shown once with a count.
STRADDLED = (
    "A token spans the end of a prompt and the start of its answer, so it carries no loss (end the prompt with white "
    "space)."
)
RECUT = (
    "The white space at the end of a prompt is tokenized differently if no answer follows it, so other servers start "
    "from other tokens (use a single newline)."
)
_AS_TEXT = "Control tokens inside messages are read as text (data.control_tokens=keep makes them tokens)."
_AS_TOKENS = "Control tokens inside messages are kept as tokens, which may begin or end turns (data.control_tokens)."
_END_REMOVED = "An answer ends in an end-of-turn token, which is removed because the template adds one."


@dataclass(frozen=True, slots=True)
class Document:
    """A text to be tokenized.

    Attributes:
        origin: ``file:line``.
        text: The text.
        answers: The assistant's parts; None for plain text, which has none.
        everything: Whether every token carries loss, not only the answers.
        chat: Whether a chat template rendered the text and wrote the special tokens. Otherwise the tokenizer adds its
            own (BOS) before the text, and the end-of-text token follows it.
        shielded: The text with the control tokens of messages hidden; None if no control token must stay text.
        control: The control tokens in messages.
        remarks: Remarks on the template and on control tokens.
        spans: Labels of plain text, by name.
    """

    origin: str
    text: str
    answers: tuple[Answer, ...] | None = None
    everything: bool = False
    chat: bool = False
    shielded: str | None = None
    control: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenized document.

    Attributes:
        ids: int32 [T].
        supervised: bool [T]; the first is always False, since nothing predicts it.
        open_turns: Number of trained turns after which no end-of-turn token is supervised.
        remarks: Remarks on the boundaries of prompts and answers.
        token_labels: Labels by name, int32 [T], ``IGNORE_INDEX`` outside of all spans.
    """

    ids: Ids
    supervised: Mask
    open_turns: int = 0
    remarks: tuple[str, ...] = ()
    token_labels: Mapping[str, Ids] = field(default_factory=dict)


def make_document(
    example: Example,
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn,
    system: str | None,
    control: ControlTokens | None = None,
    sandbox: Sandbox | None = None,
) -> Document | str:
    """Returns the document of an example with one text, or the reason to skip it.

    Args:
        example: A row.
        tokenizer: With or without a chat template.
        train_on: As ``data.train_on``.
        system: As ``data.system``.
        control: How control tokens in messages are read; by default as text.
        sandbox: Limits of the chat template; pass an entered one to render many examples faster.

    Raises:
        DataError: The chat template is missing, refuses the conversation or cannot be masked; or a message contains a
            control token and the policy is ``refuse``.
        ModelError: The chat template takes too much time or memory.
    """
    if example.text is not None:
        spans = {name: label for name, label in example.labels.items() if isinstance(label, tuple)}
        text = Document(example.origin, example.text, everything=True, spans=spans)
        return text if example.text.strip() else "Empty text."
    control = control or ControlTokens(tokenizer)
    if not example.messages and not has_template(tokenizer):
        return _make_pair(example, control, everything=train_on == "all")
    messages = list(read_conversation(example, system))
    if train_on != "all":
        while messages and messages[-1].role != "assistant":
            messages.pop()  # messages after the last answer neither carry loss nor are context of an answer
    hidden = control.shield(messages, example.origin, example.tools)
    if train_on != "all":
        trained = [message for message in hidden.messages if message.role == "assistant"]
        if not trained:
            return "No assistant turn."
        trained = trained[-1:] if train_on == "last" else trained
        if not any(message.content.strip() or message.tool_calls for message in trained):
            return "Empty answer."
    found = locate_answers(
        tokenizer, hidden.messages, train_on=train_on, origin=example.origin, sandbox=sandbox, tools=hidden.tools
    )
    return _reveal(example, hidden, found, everything=train_on == "all", chat=True)


def _make_pair(example: Example, control: ControlTokens, *, everything: bool) -> Document | str:
    """Returns prompt and completion as one text, without a chat template."""
    prompt, completion = split_prompt(example)
    hidden = control.shield((Message("user", prompt), Message("assistant", completion)), example.origin)
    shown = "".join(message.content for message in hidden.messages)
    if not hidden.messages[1].content.strip():
        return "Empty answer."
    found = Rendering(shown, (Answer(len(prompt), len(shown), len(shown)),))
    return _reveal(example, hidden, found, everything=everything, chat=False)


def _reveal(example: Example, hidden: Shielded, found: Rendering, *, everything: bool, chat: bool) -> Document:
    """Returns the document of a text that was rendered with its control tokens hidden."""
    as_text = hidden.hidden is not None
    remarks = found.remarks
    if hidden.tokens:
        remarks += (_AS_TEXT if as_text else _AS_TOKENS,)
    if hidden.ends_removed:
        remarks += (_END_REMOVED,)
    return Document(
        example.origin,
        hidden.reveal(found.text),
        found.answers,
        everything=everything,
        chat=chat,
        shielded=found.text if as_text else None,
        control=hidden.tokens,
        remarks=remarks,
    )


def cut_text(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    """Cuts a long text into pieces of about ``size`` characters whose joined tokens are those of the full text.

    Cuts are made after a single newline between two words, where byte-level BPE pre-tokenizers split anyway. If there
    is none in the second half of ``size`` characters, the cut is made at a space or in the middle, which may change a
    token.
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
        self._token_lengths = TokenLengths(self._backend)
        self._eos: int | None = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id
        self._ends = set(self._backend.get_added_tokens_decoder()) | set(tokenizer.all_special_ids)
        self._recut: dict[str, bool] = {}

    @property
    def has_eos(self) -> bool:
        """Whether the tokenizer has an end-of-text token."""
        return self._eos is not None

    @property
    def control_ids(self) -> Ids:
        """Ids of special and added tokens, ascending; they can end a turn."""
        return np.array(sorted(self._ends), dtype=np.int32)

    def encode(self, documents: Sequence[Document]) -> Iterator[Encoded]:
        """Yields ids and masks, in order."""
        are_plain = list(map(_is_plain, documents))
        plain = self._encode_plain([d.text for d, is_plain in zip(documents, are_plain, strict=True) if is_plain])
        spanned = {chat: iter(self._encode_spanned(documents, chat)) for chat in (False, True)}
        for document, is_plain in zip(documents, are_plain, strict=True):
            if is_plain:
                yield next(plain)
                continue
            if document.spans:
                yield self._encode_labelled(document)
                continue
            if document.shielded is None:
                ids, places = next(spanned[document.chat])
            else:
                encoding = self._private.encode(
                    document.text, document.shielded, document.origin, add_special_tokens=not document.chat
                )
                ids, places = np.array(encoding.ids, dtype=np.int32), OffsetPlaces(encoding)
            yield (self._mask_chat if document.chat else self._mask_pair)(ids, places, document)

    def _encode_spanned(self, documents: Sequence[Document], chat: bool) -> Iterator[tuple[Ids, Places]]:
        """Yields ids and places of the documents that need a mask and hide no control tokens."""
        masked = (d for d in documents if d.shielded is None and not _is_plain(d) and not d.spans)
        texts = [d.text for d in masked if d.chat == chat]
        fit = [self._token_lengths.fit(text) and (chat or not self._token_lengths.adds_tokens) for text in texts]
        fast = iter(
            self._backend.encode_batch_fast(
                [text for text, fits in zip(texts, fit, strict=True) if fits], add_special_tokens=not chat
            )
        )
        slow = iter(
            self._backend.encode_batch(
                [text for text, fits in zip(texts, fit, strict=True) if not fits], add_special_tokens=not chat
            )
        )
        for text, fits in zip(texts, fit, strict=True):
            encoding = next(fast if fits else slow)
            ids = np.array(encoding.ids, dtype=np.int32)
            places = self._token_lengths.places(text, ids) if fits else OffsetPlaces(encoding)
            if places is None:  # tokens are no parts of this text, so its offsets are needed
                places = OffsetPlaces(self._backend.encode(text, add_special_tokens=not chat))
            yield ids, places

    def _encode_plain(self, texts: list[str]) -> Iterator[Encoded]:
        """Yields plain texts with the end-of-text token; a long text is tokenized a few pieces at a time."""
        encodings = self._backend.encode_batch_fast([text for text in texts if len(text) <= PIECE_CHARS])
        flat, ends = array("i"), [0]  # one array for all of them, since each array takes as long as a short text
        for encoding in encodings:
            ids = encoding.ids
            flat.extend(ids[self._find_text(ids)])
            if self._eos is not None:
                flat.append(self._eos)
            ends.append(len(flat))
        ids = np.array(flat, dtype=np.int32)
        supervised = np.ones(len(ids), dtype=np.bool_)
        supervised[[start for start, end in pairwise(ends) if start < end]] = False
        borders = pairwise(ends)
        for text in texts:
            if len(text) > PIECE_CHARS:
                yield self._close_text(self._encode_long(text))
                continue
            start, end = next(borders)
            yield Encoded(ids[start:end], supervised[start:end], int(self._eos is None))

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

    def _find_text(self, ids: Ids | list[int]) -> slice:
        """Excludes a second BOS, and the EOS that some tokenizers append, because :meth:`_close` appends it."""
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

    def _encode_labelled(self, document: Document) -> Encoded:
        """Encodes plain text with labels: a token gets the label of the span that it overlaps."""
        ids, offsets = _as_arrays(self._backend.encode(document.text))
        part = self._find_text(ids)
        encoded, offsets = self._close_text(ids[part]), offsets[part]
        token_labels = {}
        for name, spans in document.spans.items():
            token_labels[name] = labels = np.full(len(encoded.ids), IGNORE_INDEX, dtype=np.int32)
            for span in spans:
                labels[: len(offsets)][(offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)] = span.label
        return replace(encoded, token_labels=token_labels)

    def _close(self, ids: Ids, supervised: Mask) -> tuple[Ids, Mask, bool]:
        """Appends the end-of-text token, which carries loss; the last result says whether the turn stays open."""
        if self._eos is not None:  # np.append takes as long as the rest of a short document
            size = len(ids)
            longer, mask = np.empty(size + 1, dtype=np.int32), np.empty(size + 1, dtype=np.bool_)
            longer[:size], mask[:size] = ids, supervised
            longer[size], mask[size] = self._eos, True
            ids, supervised = longer, mask
        supervised[:1] = False
        return ids, supervised, self._eos is None

    def _mask_pair(self, ids: Ids, places: Places, document: Document) -> Encoded:
        text = self._find_text(ids)
        assert document.answers is not None, "plain text has no prompt"
        (answer,) = document.answers
        supervised, straddled = places.split(answer.start)
        supervised |= document.everything
        ids, supervised, is_open = self._close(ids[text], supervised[text])
        return Encoded(ids, supervised, int(is_open), self._remark_borders(document, straddled))

    def _mask_chat(self, ids: Ids, places: Places, document: Document) -> Encoded:
        supervised = np.full(len(ids), document.everything, dtype=np.bool_)
        open_turns, is_open, straddled = 0, False, False
        begin = 0
        for answer in document.answers or ():
            begin = places.first_from(answer.start, begin)
            straddled |= begin > 0 and places.ends_after(begin - 1, answer.start)
            after = places.first_from(answer.content_end, begin)
            stop = places.first_from(answer.end, after)
            end = next((i for i in range(after, stop) if int(ids[i]) in self._ends), None)
            is_open = end is None
            open_turns += is_open
            if end is not None:
                stop = places.after(end)
            supervised[begin:stop] = True
        if is_open:  # the template does not end the last turn: without an end the model would never learn to stop
            ids, supervised, is_open = self._close(ids, supervised)
            open_turns -= not is_open
        supervised[:1] = False
        return Encoded(ids, supervised, open_turns, self._remark_borders(document, straddled))

    def _remark_borders(self, document: Document, straddled: bool) -> tuple[str, ...]:
        recut = any(self._is_recut(document.text, answer) for answer in document.answers or ())
        return (STRADDLED,) * straddled + (RECUT,) * recut

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
    return document.everything and not (document.chat or document.shielded is not None or document.spans)


def _as_arrays(encoding: Any) -> tuple[Ids, npt.NDArray[np.int64]]:
    return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
