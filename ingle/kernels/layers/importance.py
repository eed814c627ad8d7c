"""Collects sums of squared inputs of linear layers, from which importance matrices are computed.

A forward pass gives each input to :func:`observe`, which adds one number per column.

Legend: N rows, I columns.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

#: Rows converted at once: their float32 copy stays in cache.
_CHUNK_ROWS = 256


class Gate:
    """Decides which inputs are counted: none while it is closed, and the first rows of each while it is open.

    It is closed while backward recomputes a layer and during evaluations.
    """

    def __init__(self) -> None:
        self._num_rows: int | None = None
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None

    @contextmanager
    def opened(self, num_rows: int) -> Iterator[None]:
        """Opens the gate inside this context.

        Args:
            num_rows: Number of rows of each input that are counted; the others are padding.
        """
        self._num_rows = num_rows
        try:
            yield
        finally:
            self._num_rows = self._last = None

    def measure(self, x: Tensor) -> tuple[Tensor, int] | None:
        """Sums of squares of the columns of ``[..., I]``, float64 ``[I]``, and the number of rows; None when closed.

        Layers that share an input (q, k, v) pass the same tensor, which is summed once.
        """
        if self._num_rows is None:
            return None
        x_NI = x.detach().reshape(-1, x.shape[-1])[: self._num_rows]
        if self._last is None or self._last[0]() is not x:
            self._last = weakref.ref(x), sum_of_squares(x_NI)
        return self._last[1], len(x_NI)


class SquaredInputs:
    """Statistics of the inputs of one linear layer.

    Args:
        in_features: I.
        gate: Shared by all layers of the model.

    Attributes:
        sums: Sum of squares of each column, float64 ``[I]``, on the CPU.
        count: Number of rows.
    """

    def __init__(self, in_features: int, gate: Gate) -> None:
        self.gate = gate
        self.sums = torch.zeros(in_features, dtype=torch.float64)
        self.count = 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def observe(x: Tensor, maps: Sequence[SquaredInputs]) -> None:
    """Adds ``[..., I]`` as an input of some layers of one model, if their gate is open."""
    measured = maps[0].gate.measure(x) if maps else None
    if measured is None:
        return
    squares_I, num_rows = measured
    for each in maps:
        each.sums += squares_I
        each.count += num_rows


def sum_of_squares(x_NI: Tensor) -> Tensor:
    """Returns the sum of squares of every column, float64 ``[I]`` on the CPU; sums over a chunk of rows are float32."""
    total_I = torch.zeros(x_NI.shape[1], dtype=torch.float64, device=x_NI.device)
    for chunk in x_NI.split(_CHUNK_ROWS):
        total_I += chunk.to(torch.promote_types(chunk.dtype, torch.float32)).square().sum(0)
    return total_I.cpu()
