"""Arranges packed documents in padded rows, for architectures that do not use transformers' attention registry.

Legend: N packed tokens, D documents, R rows, W width of a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """Where each packed token is placed.

    Attributes:
        index_N: Its index in the flattened rows.
        document_RW: The document at each place; -1 for padding.
    """

    index_N: Tensor
    document_RW: Tensor

    def spread(self, values_1N: Tensor) -> Tensor:
        """Returns ``[1, N]`` as rows ``[R, W]``, padded with zeros."""
        rows_RW = values_1N.new_zeros(self.document_RW.shape)
        rows_RW.view(-1)[self.index_N] = values_1N[0]
        return rows_RW

    def gather(self, values_RWH: Tensor) -> Tensor:
        """Reverses :meth:`spread`: ``[R, W, H]`` to ``[1, N, H]``."""
        return values_RWH.flatten(0, 1)[self.index_N][None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Returns an additive mask ``[R, 1, W, W]``: causal within each document, closed between documents."""
        width = self.document_RW.shape[1]
        causal_WW = torch.ones(width, width, dtype=torch.bool, device=self.document_RW.device).tril()
        # Padding attends to padding: a softmax over fully masked scores would give NaN.
        visible = (self.document_RW[:, :, None] == self.document_RW[:, None, :]) & causal_WW
        closed = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return closed.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def arrange(cu_seqlens: Tensor, *, width: int | None) -> PaddedRows:
    """Puts documents into rows, in order, as many into each as fit.

    Args:
        cu_seqlens: First token of each document and the end, ``[D + 1]``.
        width: Maximum width; a single row if None. A longer document gets a row of its own.
    """
    rows: list[list[int]] = [[]]
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if width is not None and rows[-1] and sum(rows[-1]) + stop - start > width:
            rows.append([])
        rows[-1].append(stop - start)
    widest = max(sum(row) for row in rows)
    document_RW = torch.full((len(rows), widest), -1, dtype=torch.long)
    places, first = [], 0
    for index, row in enumerate(rows):
        places.append(torch.arange(sum(row)) + index * widest)
        numbers = torch.arange(first, first + len(row))
        document_RW[index, : sum(row)] = numbers.repeat_interleave(torch.tensor(row, dtype=torch.long))
        first += len(row)
    return PaddedRows(torch.cat(places).to(cu_seqlens.device), document_RW.to(cu_seqlens.device))
