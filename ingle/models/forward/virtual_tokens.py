"""Virtual tokens before every text: ids that prompt tuning adds to the vocabulary, or keys that prefix tuning adds.

Ids are inserted in front of every document before a model computes it, and their hidden states are left out of the
result, so nothing above knows of them. In trees they belong to the prompts. Keys take no place in a row; they only move
the positions of the tokens after them.

Legend: P virtual tokens, D documents, N tokens, M tokens and virtual tokens, Hkv key/value heads, Dh head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ingle.kernels.attention.trees import Trees

if TYPE_CHECKING:
    from ingle.data.batch import Batch


class Virtual(Protocol):
    """What an adapter adds, see ``ingle.adapters.virtual_tokens``."""

    num_tokens: int
    first_id: int | None
    is_on: bool


class Extended(NamedTuple):
    """A packed row with virtual tokens.

    Attributes:
        input_ids: ``[1, M]``.
        position_ids: ``[1, M]``.
        cu_seqlens: ``[D + 1]``.
        token_type_ids: ``[1, M]``, zero for virtual tokens; or None.
        trees: Which documents continue others.
        place_N: The place of each token of the row without them.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    token_type_ids: Tensor | None
    trees: Trees | None
    place_N: Tensor


def virtual_length(model: nn.Module) -> int:
    """Returns the number of positions that virtual tokens take before every text."""
    virtual = _virtual(model)
    return 0 if virtual is None else virtual.num_tokens


def virtual_ids(model: nn.Module) -> list[int]:
    """Returns the ids to put before a text; none if a model has only keys."""
    virtual = _virtual(model)
    if virtual is None or virtual.first_id is None:
        return []
    return list(range(virtual.first_id, virtual.first_id + virtual.num_tokens))


def num_added_keys(model: nn.Module) -> int:
    """Returns the number of added keys, which move the positions of all tokens."""
    virtual = _virtual(model)
    return 0 if virtual is None or virtual.first_id is not None else virtual.num_tokens


def _virtual(model: nn.Module) -> Virtual | None:
    found: Virtual | None = model.__dict__.get("virtual")
    return found if found is not None and found.is_on else None


def insert_ids(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    token_type_ids: Tensor | None = None,
    trees: Trees | None = None,
    *,
    fills: bool = False,
) -> Extended | None:
    """Inserts virtual ids before every document that continues no other one; returns None if a model has none.

    Args:
        model: The model.
        input_ids: ``[1, N]``; tokens after the last boundary stay at the end.
        position_ids: ``[1, N]``.
        cu_seqlens: ``[D + 1]``.
        token_type_ids: ``[1, N]`` or None.
        trees: Which documents continue others.
        fills: Add a document, as :func:`ingle.data.round_up` does and for the same reason.
    """
    added = torch.tensor(virtual_ids(model))
    if not len(added):
        return None
    device, num_tokens = input_ids.device, input_ids.shape[1]
    bounds = cu_seqlens.cpu().long()
    lengths_D = bounds.diff()
    parents = (-1,) * len(lengths_D) if trees is None else trees.parents
    begins_D = (torch.tensor(parents) < 0) & (lengths_D > 0)
    shift_D = begins_D.cumsum(0) * len(added)
    total = int(shift_D[-1])
    after = torch.full((num_tokens - int(bounds[-1]),), total)
    place_N = torch.arange(num_tokens) + torch.cat((shift_D.repeat_interleave(lengths_D), after))
    real_M = torch.zeros(num_tokens + total, dtype=torch.bool).index_fill_(0, place_N, True)
    virtual = (~real_M).nonzero()[:, 0].to(device)
    ends = bounds + torch.cat((torch.zeros(1, dtype=torch.long), shift_D))
    place_N = place_N.to(device)
    size = num_tokens + total
    filler = -size % (64 if size >= 512 else 16) if fills and device.type == "cpu" else 0
    if filler:
        ends, parents = torch.cat((ends, ends[-1:] + filler)), (*parents, -1)

    def extend(column: Tensor, values: Tensor) -> Tensor:
        row = column.new_zeros(size + filler)
        row[virtual] = values.to(column).repeat(int(begins_D.sum()))
        row[size:] = torch.arange(filler) if column is position_ids else 0
        return row.index_copy(0, place_N, column[0])[None]

    return Extended(
        extend(input_ids, added),
        extend(position_ids, torch.arange(-len(added), 0)).add_(len(added)),
        ends.to(cu_seqlens),
        None if token_type_ids is None else extend(token_type_ids, torch.zeros(len(added))),
        None if trees is None else Trees(tuple(ends.tolist()), parents),
        place_N,
    )


def extend_batch(model: nn.Module, batch: Batch) -> tuple[Batch, Tensor | None]:
    """Inserts virtual ids before every document of a batch.

    Returns:
        The batch, with those columns alone that a model reads, and the place of each token of the given one; the batch
        itself and None if a model has no virtual ids.
    """
    parents = batch.parents()
    trees = None if parents is None else Trees.of(batch.cu_seqlens.tolist(), parents)
    types = batch.columns.get("token_type_ids")
    row = insert_ids(model, batch.input_ids, batch.position_ids, batch.cu_seqlens, types, trees, fills=True)
    if row is None:
        return batch, None
    columns = {"input_ids": row.input_ids, "position_ids": row.position_ids, "cu_seqlens": row.cu_seqlens}
    if row.token_type_ids is not None:
        columns["token_type_ids"] = row.token_type_ids
    if trees is not None:
        offsets_D = batch.columns["parent_offsets"]
        more = len(row.cu_seqlens) - 1 - len(offsets_D)
        columns["parent_offsets"] = torch.cat((offsets_D, offsets_D.new_zeros(more)))
    return replace(batch, columns=columns), row.place_N
