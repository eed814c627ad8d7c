"""Boundaries of packed documents in the form of an attention mask, which every attention layer receives.

Legend: D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ingle.kernels.attention.trees import Trees

#: Rows of a mask: boundaries of queries and of keys; then, for trees, the document that each one continues; then, if
#: they are known, how many keys before and after a token it sees.
_ROWS, _TREE_ROWS, _DESCRIBED_ROWS, _DESCRIBED_TREE_ROWS = 2, 3, 4, 5
#: How many keys a token sees on a side, if it sees all.
ALL_KEYS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a mask says.

    Attributes:
        queries: First query of each document and the end, int32 ``[D + 1]``.
        keys: The same of the keys.
        longest: Queries of the longest document.
        longest_keys: Keys of the longest document.
        before: Earlier keys that a token sees in its document; None for all.
        after: Later keys that it sees; None for all.
        crosses: Whether the keys are other documents than the queries.
        described: Whether ``before`` and ``after`` are those of the architecture's mask function.
        trees: Which documents continue others; None if none does.
    """

    queries: Tensor
    keys: Tensor
    longest: int
    longest_keys: int
    before: int | None = None
    after: int | None = None
    crosses: bool = False
    described: bool = False
    trees: Trees | None = None


def make_bounds(
    queries: Tensor, keys: Tensor | None = None, *, parents: Sequence[int] | None = None, described: bool = False
) -> Tensor:
    """Returns boundaries as a mask, int32 ``[1, 1, 2, D + 1]``; transformers passes it on as it is.

    Args:
        queries: First query of each document and the end, ``[D + 1]``.
        keys: The same of the keys, if they are others.
        parents: The document that each one continues, -1 for none, in a third row; None for no trees.
        described: Return ``[1, 2, D + 1]``, for which transformers calls the function of the mask's registry.
    """
    rows = [queries, queries if keys is None else keys]
    if parents is not None:
        rows.append(torch.tensor([*parents, -1], device=queries.device))
    mask = torch.stack([row.to(torch.int32) for row in rows])[None]
    return mask if described else mask[None]


def is_bounds(mask: Any) -> TypeGuard[Tensor]:
    """Returns whether a mask of an attention layer is made of boundaries."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.dim() == 4
        and _ROWS <= mask.shape[-2] <= _DESCRIBED_TREE_ROWS
    )


def read_bounds(mask: Tensor) -> Bounds:
    """Returns what a mask made of boundaries says; reads a tensor once, because a GPU waits for it."""
    kept: Bounds | None = getattr(mask, "bounds", None)
    if kept is None:
        kept = _read(mask)
        stored: Any = mask
        stored.bounds = kept
    return kept


def has_trees(mask: Any) -> TypeGuard[Tensor]:
    """Returns whether a mask says which documents continue others."""
    return is_bounds(mask) and mask.shape[-2] in (_TREE_ROWS, _DESCRIBED_TREE_ROWS)


def trees_of(mask: Any) -> Trees | None:
    """Returns the trees of a mask for layers that know which tokens of a path they see; None if it has none."""
    if not is_bounds(mask) or mask.shape[-2] != _TREE_ROWS:
        return None
    return read_bounds(mask).trees


def _read(mask: Tensor) -> Bounds:
    rows = mask[0, 0].tolist()
    longest, longest_keys = (max(stop - start for start, stop in pairwise(row)) for row in rows[:_ROWS])
    described = len(rows) in (_DESCRIBED_ROWS, _DESCRIBED_TREE_ROWS)
    before, after = (None if row[0] == ALL_KEYS else int(row[0]) for row in rows[-2:]) if described else (None, None)
    trees = Trees.of(rows[0], rows[_ROWS][:-1]) if has_trees(mask) else None
    crosses = rows[0] != rows[1]
    return Bounds(mask[0, 0, 0], mask[0, 0, 1], longest, longest_keys, before, after, crosses, described, trees)
