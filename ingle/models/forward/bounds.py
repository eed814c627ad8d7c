"""Boundaries of packed documents in the form of an attention mask, which every attention layer receives.

Legend: D documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of boundaries in a mask: of queries, of keys.
_ROWS = 2


def causal_bounds(cu_seqlens: Tensor) -> Tensor:
    """Returns boundaries as a mask, int32 ``[1, 1, 2, D + 1]``; transformers passes it on as it is.

    Args:
        cu_seqlens: First token of each document and the end, ``[D + 1]``.
    """
    return torch.stack((cu_seqlens, cu_seqlens)).to(torch.int32)[None, None]


def is_bounds(mask: Tensor | None) -> bool:
    """Returns whether a mask is made of boundaries."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-2] == _ROWS


def query_bounds(mask: Tensor | None) -> Tensor:
    """Returns the boundaries of the queries, int32 ``[D + 1]``."""
    assert mask is not None
    return mask[0, 0, 0]
