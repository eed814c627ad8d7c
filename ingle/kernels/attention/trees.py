"""Trees of packed documents: several answers continue one prompt, which is computed once.

The prompt and its answers are documents of the packed row, the prompt first. A token sees its own document up to
itself, and all documents on the way to the root: its *path*. Positions count along the path. A document by itself is a
tree, too.

Legend: N packed tokens, D documents, L levels (documents on the longest path), M tokens of all paths, P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Paths:
    """The paths to the leaves as documents of their own: each repeats its prompt.

    Attributes:
        index_M: The token of the trees at each place.
        cu_seqlens: First token of each path and the end, int32 [P + 1].
        place_N: The place of each token of the trees; of a prompt, in its first path.
        leaves_P: The document that each path ends with.
    """

    index_M: Tensor
    cu_seqlens: Tensor
    place_N: Tensor
    leaves_P: Tensor

    def to(self, device: torch.device) -> Paths:
        """Returns the paths on a device."""
        return Paths(
            *(t.to(device, non_blocking=True) for t in (self.index_M, self.cu_seqlens, self.place_N, self.leaves_P))
        )


@dataclass(frozen=True, eq=False)
class Trees:
    """Which documents of a packed row continue others.

    Attributes:
        bounds: First token of each document and the end, ``D + 1`` numbers.
        parents: The document that each one continues, always an earlier one; -1 for none.
        made: What was made for these trees, by what it depends on.
    """

    bounds: tuple[int, ...]
    parents: tuple[int, ...]
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, bounds: Sequence[int], parents: Sequence[int]) -> Trees | None:
        """Returns the trees; None if no document continues another."""
        if all(parent < 0 for parent in parents):
            return None
        assert all(parent < document for document, parent in enumerate(parents)), "a parent comes before its children"
        return cls(tuple(bounds), tuple(parents))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Number of documents above each one."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Position of the first token of each document."""
        starts: list[int] = []
        for parent in self.parents:
            starts.append(0 if parent < 0 else starts[parent] + self.bounds[parent + 1] - self.bounds[parent])
        return tuple(starts)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest path."""
        lengths = (stop - begin for begin, stop in pairwise(self.bounds))
        return max(start + length for start, length in zip(self.starts, lengths, strict=True))

    @cached_property
    def paths(self) -> Paths:
        """The paths, in the order of their leaves; on the CPU."""
        inner = set(self.parents)
        leaves = [d for d in range(len(self.parents)) if d not in inner and self.bounds[d + 1] > self.bounds[d]]
        parts = [torch.cat([torch.arange(*self.bounds[d : d + 2]) for d in self._line(leaf)]) for leaf in leaves]
        index_M = torch.cat(parts)
        place_N = torch.empty(self.bounds[-1], dtype=torch.long)
        place_N[index_M.flip(0)] = torch.arange(len(index_M) - 1, -1, -1)  # the first of several is written last
        cu_seqlens = torch.tensor([0, *map(len, parts)]).cumsum(0).to(torch.int32)
        return Paths(index_M, cu_seqlens, place_N, torch.tensor(leaves))

    def _line(self, document: int) -> list[int]:
        line = [document]
        while self.parents[line[0]] >= 0:
            line.insert(0, self.parents[line[0]])
        return line

    def find_spans(self, before: int | None, chunk: int | None) -> tuple[Indices, Indices]:
        """Returns the first key that each token sees in each level, and one past the last; [L, N] each.

        Level 0 is the token's own document, level 1 the one above it, and so on. Where a token sees no key, both
        numbers are equal.

        Args:
            before: Earlier tokens of its path that a token sees; None for all.
            chunk: A token sees only its own chunk of this many positions.
        """
        bounds, parents = np.array(self.bounds), np.array(self.parents)
        own_N = np.repeat(np.arange(len(parents)), np.diff(bounds))
        shifts_D = np.array(self.starts) - bounds[:-1]  # from a token's index to its position
        index_N = np.arange(bounds[-1])
        position_N = index_N + shifts_D[own_N]
        lowest_N = np.zeros_like(position_N) if before is None else position_N - before
        if chunk is not None:
            lowest_N = np.maximum(lowest_N, position_N // chunk * chunk)
        first, last = [np.maximum(bounds[own_N], lowest_N - shifts_D[own_N])], [index_N + 1]
        above_N = parents[own_N]
        for _ in range(max(self.depths)):
            at_N, exists_N = above_N.clip(0), above_N >= 0
            begin_N = (lowest_N - shifts_D[at_N]).clip(bounds[at_N], bounds[at_N + 1])
            first.append(np.where(exists_N, begin_N, 0))
            last.append(np.where(exists_N, bounds[at_N + 1], 0))
            above_N = np.where(exists_N, parents[at_N], -1)
        return np.stack(first), np.stack(last)
