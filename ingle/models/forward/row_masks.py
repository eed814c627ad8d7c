"""Masks for documents that are rows of a batch, in the form that an architecture's own attention takes."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from ingle.models.forward.documents import Group

#: ``additive``: 0 or the smallest number. ``visible``: true where a query sees a key. ``hidden``: true where not.
#: ``padding``: 1 for tokens and 0 for padding, without a dimension for queries.
MaskForm = Literal["none", "additive", "visible", "hidden", "padding"]


def row_mask(
    config: PretrainedConfig, layer_idx: int | None, form: MaskForm, group: Group, dtype: torch.dtype, *, causal: bool
) -> Tensor:
    """Returns the mask ``[D, 1, L, L]`` of an attention layer, or ``[D, L]`` of the padding.

    Padding is on the right. No earlier token sees it, so that a causal mask need not know where it is.

    Args:
        config: Names the kinds of layers, their windows and chunks. Layers with the same config share their masks.
        layer_idx: The layer, if it knows its index.
        form: How to express the mask.
        group: The rows.
        dtype: Of an additive mask.
        causal: Whether a token sees earlier tokens only.
    """
    if form == "padding":
        return group.real_DL.long()
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer_idx] if kinds is not None and layer_idx is not None and layer_idx < len(kinds) else None
    key = (id(config), kind, form, dtype, causal)
    if key not in group.masks:
        group.masks[key] = _make(config, kind, form, group, dtype, causal)
    mask = group.masks[key]
    assert isinstance(mask, Tensor)
    return mask


def _make(
    config: PretrainedConfig, kind: str | None, form: MaskForm, group: Group, dtype: torch.dtype, causal: bool
) -> Tensor:
    config = copy.copy(config)
    config._attn_implementation_internal = "eager"  # transformers then makes additive masks
    rows, length = group.real_DL.shape
    like = torch.empty(rows, length, 1, device=group.real_DL.device, dtype=dtype)
    arguments: dict[str, Any] = {"config": config, "inputs_embeds": like, "past_key_values": None}
    make: Any
    if causal:
        make = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind or "", create_causal_mask)
        if kind is not None and "sliding" in kind:  # transformers 5.23 lists the full mask for hybrid_sliding
            make = create_sliding_window_causal_mask
        elif not callable(make):
            make = create_causal_mask
        mask: Tensor = make(attention_mask=None, **arguments)
    else:
        sliding = kind is not None and "sliding" in kind
        make = create_bidirectional_sliding_window_mask if sliding else create_bidirectional_mask
        mask = make(attention_mask=group.real_DL, allow_is_bidirectional_skip=False, **arguments)
    if form == "additive":
        return mask
    return mask == 0 if form == "visible" else mask != 0
