"""Micro-batches: documents laid end to end in one row, with the columns that an objective needs.

Tensor legend: N tokens of a micro-batch, D documents in it, T tokens of one document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingle.data.types import IGNORE_INDEX, Sample


class Column(NamedTuple):
    """How a column of a batch is laid out.

    Attributes:
        per: ``token``: ``[1, N]``; ``document``: ``[D]`` or ``[D, C]``; ``bounds``: offsets ``[D + 1]``.
        dtype: Dtype of its tensor.
        fill: Value for the tokens, or the document, that :func:`round_up` adds.
    """

    per: Literal["token", "document", "bounds"]
    dtype: torch.dtype
    fill: float = 0


#: Every column of a batch by name. Columns of an encoder-decoder's second row begin with ``decoder_``.
COLUMNS: Mapping[str, Column] = {
    "input_ids": Column("token", torch.int64),
    "labels": Column("token", torch.int64, IGNORE_INDEX),
    "position_ids": Column("token", torch.int64),
    "cu_seqlens": Column("bounds", torch.int32),
    "token_type_ids": Column("token", torch.int64),
    "token_labels": Column("token", torch.int64, IGNORE_INDEX),
    "weights": Column("token", torch.float32),
    "document_labels": Column("document", torch.float32),
    "document_weights": Column("document", torch.float32),
    "start_labels": Column("document", torch.int64, IGNORE_INDEX),
    "end_labels": Column("document", torch.int64, IGNORE_INDEX),
    "group_ids": Column("document", torch.int64, -1),
    "scores": Column("document", torch.float32),
    "truncated": Column("document", torch.int64),
    "parent_offsets": Column("document", torch.int32),
    "baselines": Column("document", torch.float32),
    "draws": Column("document", torch.int64),
    "answers": Column("document", torch.int64),
    "reference_logps": Column("token", torch.float32),
    "reference_states": Column("token", torch.float32),
    "old_logps": Column("token", torch.float32),
    "values": Column("token", torch.float32),
    "advantages": Column("token", torch.float32),
    "returns": Column("token", torch.float32),
    "correction_weights": Column("token", torch.float32),
    "decoder_reference_logps": Column("token", torch.float32),
    "decoder_input_ids": Column("token", torch.int64),
    "decoder_labels": Column("token", torch.int64, IGNORE_INDEX),
    "decoder_position_ids": Column("token", torch.int64),
    "decoder_cu_seqlens": Column("bounds", torch.int32),
}
_ROWS = ("", "decoder_")
#: The first of these columns that a batch has is what it predicts.
_LABELS = ("decoder_labels", "token_labels", "start_labels", "labels")


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch without padding: all documents laid end to end in a single row.

    Attributes:
        columns: Tensors by name as in :data:`COLUMNS`; always ``input_ids, labels, position_ids, cu_seqlens``.
        num_tokens: N without the tokens that :func:`round_up` adds.
        num_documents: D without the document that :func:`round_up` adds.
        num_supervised: Labels other than ``IGNORE_INDEX``, in the column that is predicted.
    """

    columns: Mapping[str, Tensor]
    num_tokens: int
    num_documents: int
    num_supervised: int

    @property
    def input_ids(self) -> Tensor:
        """int64 [1, N]."""
        return self.columns["input_ids"]

    @property
    def labels(self) -> Tensor:
        """int64 [1, N], aligned with ``input_ids``: the target that the objective assigns to each position."""
        return self.columns["labels"]

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, N], from 0 in every document; from the end of the document that it continues in trees."""
        return self.columns["position_ids"]

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [D + 1], offsets at which documents begin; the last is N."""
        return self.columns["cu_seqlens"]

    def next_labels(self) -> Tensor:
        """The label of the next position of the same document, int64 [N]; ``IGNORE_INDEX`` where there is none.

        In trees the last token of a prompt predicts the first one of the answer that follows it.
        """
        labels_N = self.labels[0].roll(-1)
        ends_D = self.cu_seqlens[1:].long() - 1
        last_D = torch.full_like(ends_D, IGNORE_INDEX)
        offsets_D = self._offsets()
        if offsets_D is not None:
            last_D[:-1] = torch.where(offsets_D[1:] == 1, labels_N[ends_D[:-1]], IGNORE_INDEX)
        labels_N[ends_D] = last_D
        return labels_N

    def parents(self) -> list[int] | None:
        """The document that each one continues, -1 for none; None if no document continues another.

        In batches of an encoder-decoder, the document whose source it reads: its own is then empty.
        """
        offsets = self.columns["parent_offsets"].tolist() if "parent_offsets" in self.columns else []
        return [d - offset if offset else -1 for d, offset in enumerate(offsets)] if any(offsets) else None

    def answers(self) -> Tensor:
        """Documents that no other one continues, int64, ascending: all if there are no trees."""
        documents, offsets_D = torch.arange(self.num_documents, device=self.cu_seqlens.device), self._offsets()
        if offsets_D is None:
            return documents
        offsets = offsets_D[: self.num_documents]
        return documents[~torch.isin(documents, (documents - offsets)[offsets > 0])]

    def path_sums(self, sums_D: Tensor) -> Tensor:
        """Adds the sums of the documents that each one continues, ``[D, ...]``; differentiable.

        Args:
            sums_D: A value for each document of the batch, or for its first ones.
        """
        offsets_D = self._offsets()
        if offsets_D is None:
            return sums_D
        offsets = offsets_D[: len(sums_D)]
        documents = torch.arange(len(sums_D), device=sums_D.device)
        above, total = documents - offsets, sums_D
        continues = offsets > 0
        while bool(continues.any()):
            total = total + sums_D[above] * continues.view(-1, *[1] * (sums_D.dim() - 1))
            continues = continues & (offsets[above] > 0)
            above = above - offsets[above]
        return total

    def multiplicity(self) -> Tensor:
        """How many documents contain each token if prompts are repeated, int64 [N]."""
        parents = self.parents()
        lengths = self.cu_seqlens.diff().long()
        counts = torch.ones_like(lengths)
        if parents is not None:
            inner = set(parents)
            found = [int(d not in inner) for d in range(len(parents))]
            for document in range(len(parents) - 1, -1, -1):
                if parents[document] >= 0:
                    found[parents[document]] += found[document]
            counts = torch.tensor(found, device=lengths.device)
        return counts.repeat_interleave(lengths)

    def _offsets(self) -> Tensor | None:
        """Returns how many documents before each one is the one that it continues, int64 [D]; None without trees."""
        if "parent_offsets" not in self.columns or "decoder_input_ids" in self.columns:
            return None
        return self.columns["parent_offsets"].long()

    def split(self, parts: int) -> list[Batch]:
        """Splits the batch into at most ``parts`` with about equal numbers of tokens, at the borders of its rows.

        The documents of a row (those with the same ``group_ids``) and those of a tree stay together. Drops what
        :func:`round_up` added.
        """
        if self.num_documents == 0:
            return [self]
        borders = np.ones(self.num_documents, bool)
        if "group_ids" in self.columns:
            ids = self.columns["group_ids"][: self.num_documents].numpy(force=True)
            borders[:-1] &= ids[1:] != ids[:-1]
        if "parent_offsets" in self.columns:
            borders[:-1] &= self.columns["parent_offsets"][1 : self.num_documents].numpy(force=True) == 0
        ends = np.arange(1, self.num_documents + 1)[borders]
        tokens = self.cu_seqlens.numpy(force=True)[ends]
        wanted = np.arange(1, parts) * (int(tokens[-1]) / parts)
        cuts = sorted({0, *ends[np.abs(tokens[None] - wanted[:, None]).argmin(1)].tolist(), self.num_documents})
        return [self._slice(first, last) for first, last in pairwise(cuts)]

    def _slice(self, first: int, last: int) -> Batch:
        """Returns documents ``first`` to ``last - 1``."""
        columns = {}
        for name, column in self.columns.items():
            bounds = self.columns["decoder_cu_seqlens" if name.startswith("decoder_") else "cu_seqlens"]
            match COLUMNS[name].per:
                case "bounds":
                    columns[name] = bounds[first : last + 1] - bounds[first]
                case "document":
                    columns[name] = column[first:last]
                case "token":
                    columns[name] = column[:, int(bounds[first]) : int(bounds[last])]
        return _counted(columns, last - first)

    def without_labels(self) -> Batch:
        """Returns a batch that counts for nothing, for a rank without data.

        The rank takes part in gathering weights and reducing gradients, to which it adds zeros.
        """
        labels = [name for name in self.columns if COLUMNS[name].fill == IGNORE_INDEX]
        columns = {name: torch.full_like(self.columns[name], IGNORE_INDEX) for name in labels}
        return replace(self, columns={**self.columns, **columns}, num_tokens=0, num_documents=0, num_supervised=0)

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on another device; a copy to a CUDA device does not wait for earlier work there."""
        if torch.device(device).type != "cuda":
            return replace(self, columns={name: column.to(device) for name, column in self.columns.items()})
        pinned = {name: column if column.is_cuda else column.pin_memory() for name, column in self.columns.items()}
        return replace(self, columns={name: column.to(device, non_blocking=True) for name, column in pinned.items()})


def collate(samples: Sequence[Sample]) -> Batch:
    """Lays documents end to end in one row.

    Args:
        samples: Documents with the same columns.

    Returns:
        A batch on the CPU; positions restart in every document that continues no other.
    """
    assert samples, "an empty batch"
    documents = [{"input_ids": sample.input_ids, "labels": sample.labels, **sample.columns} for sample in samples]
    columns = {name: _join(name, [document[name] for document in documents]) for name in documents[0]}
    for row in _ROWS:
        if f"{row}input_ids" in columns:
            lengths = [len(document[f"{row}input_ids"]) for document in documents]
            starts = _starts(columns, lengths) if row == "" else [0] * len(lengths)
            positions = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
            columns[f"{row}position_ids"] = _join(f"{row}position_ids", positions)
            columns[f"{row}cu_seqlens"] = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    return _counted(columns, len(samples))


def round_up(batch: Batch) -> Batch:
    """Adds a document without loss, so that the length of a row is a multiple of 64 (of 16 below 512 tokens).

    The matrix library of a CPU compiles and caches code for every length: thousands of different lengths would cost
    hundreds of megabytes and much time. No other document attends to the added one, and the counts of the batch
    exclude it.
    """
    lengths = {row: batch.columns[f"{row}input_ids"].shape[1] for row in _ROWS if f"{row}input_ids" in batch.columns}
    steps = {row: 64 if length >= 512 else 16 for row, length in lengths.items()}
    missing = {row: -length % steps[row] for row, length in lengths.items()}
    if not any(missing.values()):
        return batch
    missing = {row: count or steps[row] for row, count in missing.items()}  # every row gets the added document
    return replace(
        batch,
        columns={
            name: _pad(name, column, missing["decoder_" if name.startswith("decoder_") else ""])
            for name, column in batch.columns.items()
        },
    )


def _counted(columns: Mapping[str, Tensor], num_documents: int) -> Batch:
    supervised = next(columns[name] for name in _LABELS if name in columns) != IGNORE_INDEX
    return Batch(columns, columns["input_ids"].shape[1], num_documents, int(supervised.sum()))


def _starts(columns: Mapping[str, Tensor], lengths: Sequence[int]) -> list[int]:
    """Returns the position of the first token of each document."""
    starts = [0] * len(lengths)
    for document, offset in enumerate(columns["parent_offsets"].tolist() if "parent_offsets" in columns else ()):
        if offset:
            starts[document] = starts[document - offset] + lengths[document - offset]
    return starts


def _join(name: str, parts: Sequence[npt.NDArray[Any]]) -> Tensor:
    joined = torch.from_numpy(np.concatenate([np.atleast_1d(part) for part in parts])).to(COLUMNS[name].dtype)
    return joined[None] if COLUMNS[name].per == "token" else joined


def _pad(name: str, column: Tensor, missing: int) -> Tensor:
    if COLUMNS[name].per == "bounds":
        return torch.cat([column, column[-1:] + missing])
    if name.endswith("position_ids"):
        return torch.cat([column, torch.arange(missing)[None]], 1)
    is_token = COLUMNS[name].per == "token"
    shape = (1, missing) if is_token else (1, *column.shape[1:])
    return torch.cat([column, column.new_full(shape, COLUMNS[name].fill)], 1 if is_token else 0)
