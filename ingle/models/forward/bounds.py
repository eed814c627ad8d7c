"""Boundaries of packed documents in the form of an attention mask, which every attention layer receives.

A mask of three dimensions reaches :func:`describe` together with the architecture's own mask function, which then says
which keys a token sees. A mask of four dimensions reaches the layers as it is; they use their own settings.

Legend: D documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from ingle.errors import ModelError

#: Rows of a mask: boundaries of queries and of keys; then, if they are known, how many keys before and after a token
#: it sees.
_ROWS, _DESCRIBED_ROWS = 2, 4
_ALL = 2**31 - 1


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
    """

    queries: Tensor
    keys: Tensor
    longest: int
    longest_keys: int
    before: int | None = None
    after: int | None = None
    crosses: bool = False
    described: bool = False


def make_bounds(queries: Tensor, keys: Tensor | None = None, *, described: bool = False) -> Tensor:
    """Returns boundaries as a mask, int32 ``[1, 1, 2, D + 1]``; transformers passes it on as it is.

    Args:
        queries: First query of each document and the end, ``[D + 1]``.
        keys: The same of the keys, if they are others.
        described: Return ``[1, 2, D + 1]``, for which transformers calls :func:`describe`.
    """
    mask = torch.stack((queries, queries if keys is None else keys)).to(torch.int32)[None]
    return mask if described else mask[None]


def is_bounds(mask: Any) -> bool:
    """Returns whether a mask of an attention layer is made of boundaries."""
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.int32
        and mask.dim() == 4
        and mask.shape[-2] in (_ROWS, _DESCRIBED_ROWS)
    )


def read_bounds(mask: Tensor) -> Bounds:
    """Returns what a mask made of boundaries says; reads a tensor once, because a GPU waits for it."""
    kept: Bounds | None = getattr(mask, "bounds", None)
    if kept is None:
        kept = _read(mask)
        stored: Any = mask
        stored.bounds = kept
    return kept


def _read(mask: Tensor) -> Bounds:
    rows = mask[0, 0].tolist()
    longest, longest_keys = (max(stop - start for start, stop in pairwise(row)) for row in rows[:_ROWS])
    described = len(rows) == _DESCRIBED_ROWS
    before, after = (None if row[0] == _ALL else int(row[0]) for row in rows[_ROWS:]) if described else (None, None)
    return Bounds(mask[0, 0, 0], mask[0, 0, 1], longest, longest_keys, before, after, rows[0] != rows[1], described)


def describe(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """Adds to boundaries which keys a token sees, as the architecture's mask function says; makes other masks as usual.

    transformers calls it for every kind of layer of a model.

    Args:
        mask_function: Returns whether a query sees a key, from the indices of row, head, query and key.
        attention_mask: Boundaries ``[1, 2, D + 1]`` from :func:`make_bounds`, or a mask of padding.
        options: For other masks.

    Returns:
        int32 ``[1, 1, 4, D + 1]`` for boundaries.

    Raises:
        ModelError: The keys that a token sees are no range around it.
    """
    if attention_mask is None or attention_mask.dim() != 3:
        mask: Tensor | None = sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **options)
        return mask
    rows = attention_mask[0].tolist()
    longest = max(stop - start for row in rows for start, stop in pairwise(row))
    first = torch.tensor(0)
    places = torch.arange(2 * longest + 1)
    seen: Any = mask_function(first, first, torch.tensor(longest), places)
    visible = torch.as_tensor(seen).expand(len(places)).nonzero().flatten().tolist()
    if not visible or len(visible) != visible[-1] - visible[0] + 1 or not visible[0] <= longest <= visible[-1]:
        raise ModelError(
            "The attention of this architecture does not see all tokens in a range, so documents cannot be packed.",
            where="model.id",
            fix="choose a model of another architecture",
        )
    reach = (longest - visible[0], visible[-1] - longest)
    added = [torch.full_like(attention_mask[0, 0], _ALL if each >= longest else each) for each in reach]
    return torch.cat((attention_mask[0], torch.stack(added)))[None, None]
