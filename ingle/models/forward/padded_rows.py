"""Packed documents in rows of limited width, for architectures whose attention is their own.

Legend: N packed tokens, D documents, R rows, W tokens of a row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each packed token stands.

    Attributes:
        place_N: Its index in the flattened rows.
        document_RW: Which document a place belongs to; -1 where there is none.
    """

    place_N: Tensor
    document_RW: Tensor

    def spread(self, values_1N: Tensor) -> Tensor:
        """``[1, N]`` in rows, ``[R, W]``; zeros where there is no token."""
        rows_RW = values_1N.new_zeros(self.document_RW.shape)
        rows_RW.view(-1)[self.place_N] = values_1N[0]
        return rows_RW

    def gather(self, values_RWH: Tensor) -> Tensor:
        """Undoes :meth:`spread`: ``[R, W, H]`` to ``[1, N, H]``."""
        return values_RWH.flatten(0, 1)[self.place_N][None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """An additive mask ``[R, 1, W, W]``: causal within each document, closed elsewhere."""
        width = self.document_RW.shape[1]
        causal_WW = torch.ones(width, width, dtype=torch.bool, device=self.document_RW.device).tril()
        # Places without a token see one another: a row that sees nothing would give NaN.
        visible = (self.document_RW[:, :, None] == self.document_RW[:, None, :]) & causal_WW
        closed = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return closed.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def lay_out(cu_seqlens: Tensor, *, width: int | None) -> Layout:
    """Puts documents into rows, in order, as many into each as fit.

    Args:
        cu_seqlens: First token of each document and the end, ``[D + 1]``.
        width: Widest row; one row for all when None. A document that is longer has a row to itself.
    """
    bounds = cu_seqlens.tolist()
    rows: list[list[int]] = [[]]
    room = width
    for start, stop in itertools.pairwise(bounds):
        if room is not None and width is not None:
            if stop - start > room and rows[-1]:
                rows.append([])
                room = width
            room -= stop - start
        rows[-1].append(stop - start)
    widest = max(sum(row) for row in rows)
    document_RW = torch.full((len(rows), widest), -1, dtype=torch.long)
    places, number = [], 0
    for index, row in enumerate(rows):
        places.append(torch.arange(sum(row)) + index * widest)
        numbers = torch.arange(number, number + len(row))
        document_RW[index, : sum(row)] = numbers.repeat_interleave(torch.tensor(row, dtype=torch.long))
        number += len(row)
    return Layout(torch.cat(places).to(cu_seqlens.device), document_RW.to(cu_seqlens.device))
