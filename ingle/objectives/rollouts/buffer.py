"""The sample buffer: the answers of an iteration, with everything that was computed about them.

All arrays are flat and on the CPU, and equal on all ranks, so that neither advantages nor minibatches depend on the
number of ranks.

Legend: R answers, N tokens of all answers end to end, M tokens of all prompts end to end, F reward functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingle.data.types import IGNORE_INDEX, Sample

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


class Column(NamedTuple):
    """A column of the buffer.

    Attributes:
        per: What it has a value for.
        dtype: Type of its values.
        in_batches: Whether the update reads it: it becomes a column of the samples.
    """

    per: Literal["prompt_token", "token", "answer"]
    dtype: type[np.generic]
    in_batches: bool = False


#: Every column by name. The first seven are always there.
BUFFER_COLUMNS: Mapping[str, Column] = {
    "prompt_ids": Column("prompt_token", np.int32),
    "prompt_lengths": Column("answer", np.int64),
    "ids": Column("token", np.int32),
    "lengths": Column("answer", np.int64),
    "draws": Column("answer", np.int64, in_batches=True),
    "answers": Column("answer", np.int64, in_batches=True),
    "rows": Column("answer", np.int64),
    "statuses": Column("answer", np.int8),
    "scores": Column("answer", np.float32, in_batches=True),
    "rewards": Column("answer", np.float64),
    "counted": Column("token", np.bool_),
    "weights": Column("token", np.float32, in_batches=True),
    "sampler_logps": Column("token", np.float32),
    "entropies": Column("token", np.float32),
    "old_logps": Column("token", np.float32, in_batches=True),
    "reference_logps": Column("token", np.float32, in_batches=True),
    "values": Column("token", np.float32, in_batches=True),
    "advantages": Column("token", np.float32, in_batches=True),
    "returns": Column("token", np.float32, in_batches=True),
    "correction_weights": Column("token", np.float32, in_batches=True),
}
_REQUIRED = ("prompt_ids", "prompt_lengths", "ids", "lengths", "draws", "answers", "rows")


@dataclass(frozen=True)
class SampleBuffer:
    """Sampled answers, one after the other; those to one prompt are adjacent.

    Attributes:
        columns: Arrays by name as in :data:`BUFFER_COLUMNS`. ``draws`` numbers the prompts that were drawn, ``answers``
            the answers to one, and ``rows`` the rows of the data; ``counted`` marks the tokens that the loss counts:
            those that the policy chose, of answers that are not left out.
    """

    columns: Mapping[str, Array]

    def __post_init__(self) -> None:
        missing = [name for name in _REQUIRED if name not in self.columns]
        assert not missing, missing
        sizes = {"prompt_token": int(self["prompt_lengths"].sum()), "token": int(self["lengths"].sum())}
        sizes["answer"] = len(self["lengths"])
        for name, values in self.columns.items():
            per, dtype, _ = BUFFER_COLUMNS[name]
            assert len(values) == sizes[per] and values.dtype == dtype, (name, values.shape, values.dtype, sizes[per])

    def __len__(self) -> int:
        return len(self["lengths"])

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    def adding(self, **columns: npt.ArrayLike) -> SampleBuffer:
        """Returns the buffer with further columns, cast to their dtypes."""
        new = {name: np.asarray(values, BUFFER_COLUMNS[name].dtype) for name, values in columns.items()}
        return SampleBuffer({**self.columns, **new})

    def select(self, rows: Integers) -> SampleBuffer:
        """Returns some answers, in the order of their numbers in ``rows``."""
        places = {
            "answer": rows,
            "token": _places(self["lengths"], rows),
            "prompt_token": _places(self["prompt_lengths"], rows),
        }
        return SampleBuffer({name: each[places[BUFFER_COLUMNS[name].per]] for name, each in self.columns.items()})

    def by_answer(self, name: str) -> list[Array]:
        """Returns a column of tokens, cut into the answers (or the prompts)."""
        lengths = self["prompt_lengths" if BUFFER_COLUMNS[name].per == "prompt_token" else "lengths"]
        return np.split(self[name], np.cumsum(lengths)[:-1]) if len(self) else []

    def minibatches(
        self, size: int, permute: Callable[[int], Integers] | None = None, *, by_group: bool = False
    ) -> list[Integers]:
        """Returns the numbers of the answers in each minibatch of a pass.

        Args:
            size: Answers of a minibatch; divides their number.
            permute: Returns a permutation of so many elements; None leaves the order of the buffer, in which the
                log-probabilities of the first pass were computed.
            by_group: Whether answers to one prompt stay together.
        """
        assert len(self) % size == 0, (len(self), size)
        units = np.arange(len(self))
        if permute is not None and by_group:
            starts = np.flatnonzero(np.diff(self["draws"], prepend=-1))
            groups = np.split(units, starts[1:])
            units = np.concatenate([groups[number] for number in permute(len(groups))])
        elif permute is not None:
            units = permute(len(self))
        return np.split(units, len(self) // size)

    def samples(self, rows: Integers, *, masked: bool = True) -> list[Sample]:
        """Returns answers as documents: prompt and answer, labels at the counted tokens.

        A column of tokens has the value of each token at its own position, and 0 in the prompt. Answers to one prompt
        have the same ``group_ids``.

        Args:
            rows: Numbers of the answers.
            masked: Whether tokens that do not count have no label.
        """
        part = self.select(rows)
        prompts, answers = part.by_answer("prompt_ids"), part.by_answer("ids")
        names = [name for name in part.columns if BUFFER_COLUMNS[name].in_batches]
        by_row = {name: part.by_answer(name) if BUFFER_COLUMNS[name].per == "token" else part[name] for name in names}
        counted = (
            part.by_answer("counted")
            if masked and "counted" in part.columns
            else [np.ones(len(a), np.bool_) for a in answers]
        )
        samples = []
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            columns = {
                name: np.concatenate([np.zeros(len(prompt), np.float32), values[row]])
                if BUFFER_COLUMNS[name].per == "token"
                else values[row]
                for name, values in by_row.items()
            }
            labels = np.where(counted[row], answer, IGNORE_INDEX)
            samples.append(
                Sample(
                    np.concatenate([prompt, answer]),
                    np.concatenate([np.full(len(prompt), IGNORE_INDEX, np.int32), labels]).astype(np.int32),
                    {**columns, "group_ids": part["draws"][row]},
                )
            )
        return samples

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the columns as tensors."""
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in self.columns.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> SampleBuffer:
        """Returns the buffer whose :meth:`state_dict` this is."""
        return cls({name: tensor.numpy() for name, tensor in state.items()})

    @classmethod
    def joined(cls, parts: Sequence[SampleBuffer]) -> SampleBuffer:
        """Returns the answers of several buffers with the same columns, one buffer after the other."""
        assert len({tuple(part.columns) for part in parts}) == 1, [tuple(part.columns) for part in parts]
        return cls({name: np.concatenate([part[name] for part in parts]) for name in parts[0].columns})


def _places(lengths: Integers, rows: Integers) -> Integers:
    """Returns the places of the tokens of some rows among those of all."""
    firsts = (np.cumsum(lengths) - lengths)[rows]
    chosen = lengths[rows]
    within = np.arange(chosen.sum()) - np.repeat(np.cumsum(chosen) - chosen, chosen)
    return np.asarray(np.repeat(firsts, chosen) + within, np.int64)
