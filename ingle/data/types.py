"""The types of the data layer: examples (rows that were read) and samples (tokenized documents).

Tensor legend: T tokens of one document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingle.kernels import IGNORE_INDEX as IGNORE_INDEX

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Tokenizer(Protocol):
    """The part of transformers' fast tokenizers that data, generation and evaluation use."""

    @property
    def backend_tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` inside."""

    @property
    def chat_template(self) -> Any:
        """A Jinja template, or None."""

    @property
    def bos_token_id(self) -> Any:
        """Id of the token that opens a text, or None."""

    @property
    def eos_token_id(self) -> Any:
        """Id of the token that ends a text, or None."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""

    def get_vocab(self) -> Mapping[str, int]:
        """Returns the id of every token."""

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Tokenizes a text."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Renders a conversation."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Turns ids into text."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user``, ``assistant``, ``tool`` or ``developer``.
        content: Its text.
        tool_calls: The tools that an assistant calls, as JSON; empty if it calls none.
        name: The tool whose result the message is; empty if it does not say.
        call_id: The call whose result the message is; empty if it does not say.
    """

    role: str
    content: str
    tool_calls: str = ""
    name: str = ""
    call_id: str = ""

    @property
    def written(self) -> str:
        """All that a template may write of it."""
        if not (self.tool_calls or self.name or self.call_id):
            return self.content
        return "\n".join((self.content, self.tool_calls, self.name, self.call_id))


class Span(NamedTuple):
    """Characters ``start`` to ``end`` (exclusive) of a text, and the label of the tokens that overlap them."""

    start: int
    end: int
    label: int = 0


#: What a row teaches: the name of a class, or a number as text; the names of several classes; a tag for each word; or
#: the places of the answers in a context, none if it contains no answer.
Label = str | tuple[str, ...] | tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a source, read but not yet tokenized.

    Exactly one of ``messages``, ``prompt`` with ``completion``, ``text`` and ``texts`` is set.

    Attributes:
        origin: ``file:line``, or ``file:row N`` if lines do not separate the rows of the file.
        messages: A conversation.
        prompt: The beginning of a text, which carries no loss.
        completion: Its continuation.
        text: Plain text.
        references: Further accepted answers, in addition to the last assistant message or the completion.
        texts: The texts of a row that has several (such as ``chosen`` and ``rejected``), by name and in order. Each is
            an example with a single text.
        labels: Labels by name, see :data:`ingle.data.batch.COLUMNS`: a number for every document of the row, or spans
            of ``text`` for a label per token. Every row of a dataset has the same names.
        label: The label of a row of ``classify``, ``tag`` or ``answer``; None if it is unknown.
        words: The words of ``text``, as characters from and to (exclusive).
        tools: The tools that a conversation may call, as a JSON list; empty if there are none.
        columns: Further columns of a row of which only the prompt is read, as JSON values; rewards get them.
        remarks: What is unusual about the row but does not exclude it, in sentences.
    """

    origin: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    references: tuple[str, ...] = ()
    texts: Mapping[str, Example] = field(default_factory=dict, hash=False)
    labels: Mapping[str, float | tuple[Span, ...]] = field(default_factory=dict, hash=False)
    label: Label | None = None
    words: tuple[tuple[int, int], ...] = ()
    tools: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.prompt is None) == (self.completion is None), self.origin
        given = (bool(self.messages), self.prompt is not None, self.text is not None, bool(self.texts))
        assert sum(given) == 1, self.origin


#: Reads a row, given its ``file:line``.
RowParser = Callable[[Mapping[str, Any], str], Example]


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized document.

    Attributes:
        input_ids: int32 [T].
        labels: int32 [T], aligned with ``input_ids``; ``IGNORE_INDEX`` at positions without loss. In language
            modelling a label is the token itself, and the first is ``IGNORE_INDEX``, since nothing predicts it.
        columns: Further columns by name, see :data:`ingle.data.batch.COLUMNS`: [T], or a single value.
    """

    input_ids: Ids
    labels: Ids
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def last_answer(example: Example) -> str | None:
    """Returns the completion, or the last assistant message with its calls; None if there is neither."""
    if example.completion is not None:
        return example.completion
    answers: Sequence[str] = [m.written for m in example.messages if m.role == "assistant"]
    return answers[-1] if answers else None
