"""Which tokens of its document a token sees, as the architecture itself says.

Boundaries of packed documents (:mod:`ingle.kernels.attention.bounds`) reach attention layers as their mask. A mask of
three dimensions reaches :func:`describe` together with the architecture's own mask function, which then says which keys
a token sees. A mask of four dimensions reaches the layers as it is; they use their own settings.

Legend: D documents.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from ingle.errors import ModelError
from ingle.kernels.attention.bounds import ALL_KEYS
from ingle.kernels.attention.cached import keep_in, store_of
from ingle.kernels.attention.trees import Trees


def describe(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """Adds to boundaries which keys a token sees, as the architecture's mask function says; makes other masks as usual.

    transformers calls it for every kind of layer of a model.

    Args:
        mask_function: Returns whether a query sees a key, from the indices of row, head, query and key.
        attention_mask: Boundaries ``[1, 2, D + 1]`` from :func:`~ingle.kernels.attention.bounds.make_bounds`, of trees
            ``[1, 3, D + 1]``, or a mask of padding.
        options: For other masks.

    Returns:
        int32 ``[1, 1, 4, D + 1]`` for boundaries, ``[1, 1, 5, D + 1]`` for those of trees.

    Raises:
        ModelError: The keys that a token sees are no range around it.
    """
    if attention_mask is None or attention_mask.dim() != 3:
        mask: Tensor | None = sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **options)
        return mask
    rows = attention_mask[0].tolist()
    trees = Trees.of(rows[0], rows[2][:-1]) if len(rows) > 2 else None
    lengths = (stop - start for row in rows[:2] for start, stop in pairwise(row))
    longest = max(lengths) if trees is None else trees.longest
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
    added = [torch.full_like(attention_mask[0, 0], ALL_KEYS if each >= longest else each) for each in reach]
    described = torch.cat((attention_mask[0], torch.stack(added)))[None, None]
    store = store_of(attention_mask)
    return described if store is None else keep_in(described, store)
