"""Examples and samples: what the data layer passes on.

Tensor legend: T tokens of one document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Turn text into ids."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Turn ids into text."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user``, ``assistant``, ``tool`` or ``developer``.
        content: What was said.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a source, read but not yet tokenized.

    Exactly one of ``messages``, ``prompt`` with ``completion``, and ``text`` is set.

    Attributes:
        origin: ``file:line`` (``file:row`` where a file has no lines).
        messages: A conversation.
        prompt: What is given.
        completion: What is to be answered.
        text: Plain text.
        references: Further accepted answers; the last assistant message or the completion is the first.
    """

    origin: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.prompt is None) == (self.completion is None), self.origin
        assert sum((bool(self.messages), self.prompt is not None, self.text is not None)) == 1, self.origin


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenized document.

    Attributes:
        input_ids: int32 [T].
        labels: int32 [T], aligned with ``input_ids``, ``IGNORE_INDEX`` where a position carries no loss.  In language
            modelling a label is the token itself, and the first is ``IGNORE_INDEX``, since nothing predicts it.
        columns: Further columns by name, see :data:`ingle.data.batch.COLUMNS`: [T], or a single value.
    """

    input_ids: Ids
    labels: Ids
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def last_answer(example: Example) -> str | None:
    """The first reference of an example: its completion, or what the assistant says last."""
    if example.completion is not None:
        return example.completion
    answers: Sequence[str] = [m.content for m in example.messages if m.role == "assistant"]
    return answers[-1] if answers else None
