"""What the data layer passes on: examples, samples and padding-free batches.

Tensor legend: N flattened tokens of a micro-batch, D documents in it, T tokens of one document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

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
        labels: int32 [T], unshifted: the label of a token is the token itself, or ``IGNORE_INDEX``;
            the first is always ``IGNORE_INDEX``, since nothing predicts it.
    """

    input_ids: Ids
    labels: Ids


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch without padding: all documents one after the other in a single row.

    Attributes:
        input_ids: int64 [1, N].
        labels: int64 [1, N], unshifted.
        position_ids: int64 [1, N], from 0 in every document.
        cu_seqlens: int32 [D + 1], where documents begin; the last is N.
        num_tokens: N, less what :func:`ingle.data.round_up` has added.
        num_supervised: Labels other than ``IGNORE_INDEX``.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    num_tokens: int
    num_supervised: int

    def targets(self) -> torch.Tensor:
        """What each position predicts: the label of the next one, int64 [N]; the last predicts nothing."""
        targets_N = torch.full_like(self.labels[0], IGNORE_INDEX)
        targets_N[:-1] = self.labels[0, 1:]
        return targets_N

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            num_tokens=self.num_tokens,
            num_supervised=self.num_supervised,
        )


def last_answer(example: Example) -> str | None:
    """The first reference of an example: its completion, or what the assistant says last."""
    if example.completion is not None:
        return example.completion
    answers: Sequence[str] = [m.content for m in example.messages if m.role == "assistant"]
    return answers[-1] if answers else None
