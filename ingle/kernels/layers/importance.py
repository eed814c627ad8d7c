"""Sums of squared inputs of linear maps: what an importance matrix is made of, gathered in passing.

A forward pass hands every input to :func:`observe`; nothing is kept of it but one number a column.

Legend: N rows, I columns.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

#: Rows widened at once: their float32 copy stays in cache.
_CHUNK_ROWS = 256


class Gate:
    """Decides which inputs count: none until it is opened, and then the first rows of each.

    A pass that computes a layer again (recompute in backward) or answers for an evaluation finds it closed.
    """

    def __init__(self) -> None:
        self._num_rows: int | None = None
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None

    @contextmanager
    def opened(self, num_rows: int) -> Iterator[None]:
        """Lets inputs count inside the block.

        Args:
            num_rows: Rows of each input that count; what follows is padding.
        """
        self._num_rows = num_rows
        try:
            yield
        finally:
            self._num_rows = self._last = None

    def measure(self, x: Tensor) -> tuple[Tensor, int] | None:
        """Sums of squares of the columns of ``[..., I]``, float64 ``[I]``, and rows that counted; None when closed.

        Maps that share an input (q, k, v) come with the same tensor, which is summed once.
        """
        if self._num_rows is None:
            return None
        x_NI = x.detach().reshape(-1, x.shape[-1])[: self._num_rows]
        if self._last is None or self._last[0]() is not x:
            self._last = weakref.ref(x), sum_of_squares(x_NI)
        return self._last[1], len(x_NI)


class SquaredInputs:
    """What one linear map has seen.

    Args:
        in_features: I.
        gate: Of the whole model.

    Attributes:
        sums: Sum of squares of each column, float64 ``[I]``, on the CPU.
        count: Rows seen.
    """

    def __init__(self, in_features: int, gate: Gate) -> None:
        self.gate = gate
        self.sums = torch.zeros(in_features, dtype=torch.float64)
        self.count = 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def observe(x: Tensor, maps: Sequence[SquaredInputs]) -> None:
    """Counts ``[..., I]`` as an input of the maps, all of one model, if their gate is open."""
    measured = maps[0].gate.measure(x) if maps else None
    if measured is None:
        return
    squares_I, num_rows = measured
    for each in maps:
        each.sums += squares_I
        each.count += num_rows


def sum_of_squares(x_NI: Tensor) -> Tensor:
    """Sum of squares of every column, float64 ``[I]`` on the CPU: float32 within a chunk of rows, float64 across."""
    total_I = torch.zeros(x_NI.shape[1], dtype=torch.float64, device=x_NI.device)
    for chunk in x_NI.split(_CHUNK_ROWS):
        total_I += chunk.to(torch.promote_types(chunk.dtype, torch.float32)).square().sum(0)
    return total_I.cpu()
