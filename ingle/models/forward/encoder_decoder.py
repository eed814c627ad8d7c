"""Runs encoder-decoders over pairs of documents: the sources are packed in one row, and the targets in another.

Legend: N tokens of the sources, M tokens of the targets, D pairs, L length of the longest document of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ingle.kernels.attention.bounds import make_bounds
from ingle.models.forward.documents import Documents
from ingle.models.forward.layout import boundaries_of, layout_of, padding_of
from ingle.models.forward.mixers import original_class, parameters
from ingle.models.forward.to_head import run_to_head
from ingle.models.forward.virtual_tokens import insert_ids
from ingle.models.text_part import padding_id


class Row(NamedTuple):
    """Packed documents.

    Attributes:
        ids: ``[1, N]``.
        position_ids: ``[1, N]``, from 0 in every document.
        cu_seqlens: First token of each document and the end, int32 ``[D + 1]``.
    """

    ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, documents: Sequence[Tensor]) -> Row:
        """Packs documents ``[L]``."""
        positions = torch.cat([torch.arange(len(document)) for document in documents])
        lengths = torch.tensor([0, *map(len, documents)])
        device = documents[0].device
        return cls(
            torch.cat(list(documents))[None],
            positions[None].to(device),
            lengths.cumsum(0).to(device, torch.int32),
        )

    def lengths(self) -> list[int]:
        """Returns the lengths of the documents."""
        return [stop - start for start, stop in pairwise(self.cu_seqlens.tolist())]


def forward_pairs(model: PreTrainedModel, source: Row, target: Row, owners: Sequence[int] | None = None) -> Tensor:
    """Returns the input of the output layer for each token of the targets, ``[1, M, H]``.

    A token of a target sees its own source and the earlier tokens of its target, and nothing else.

    Args:
        model: An encoder-decoder from :func:`ingle.models.meta_model`, with weights.
        source: What the encoder reads.
        target: What the decoder reads, as many documents.
        owners: The pair whose source each target reads, -1 for its own; None if each reads its own. The targets that
            read a source follow each other, and pairs that do not own their source have an empty one.
    """
    layout = layout_of(model)
    source = _extend(model, source)
    if layout.kind in ("rows", "equal_rows"):
        return _forward_rows(model, source, target, owners)
    crossed = target.cu_seqlens, source.cu_seqlens
    if owners is not None:  # a target sees all of its source, so those of one source are one document
        borders = [place for place, owner in enumerate(owners) if owner < 0]
        crossed = target.cu_seqlens[[*borders, -1]], source.cu_seqlens[[*borders, -1]]
    arguments: dict[str, Any] = {
        "encoder_outputs": _encode(model, source),
        "attention_mask": make_bounds(*crossed, described=layout.described),
        "decoder_input_ids": target.ids,
        "decoder_attention_mask": make_bounds(target.cu_seqlens, described=layout.described),
        "use_cache": False,
    }
    if "position_ids" in parameters(original_class(model.get_decoder())):
        arguments["decoder_position_ids"] = target.position_ids
    with _holding(model, target):
        return run_to_head(model, arguments)


def pair_to_head(model: PreTrainedModel, source: Tensor, target: Tensor) -> Tensor:
    """Returns the input of the output layer ``[L, H]`` for a target ``[L]`` alone, as transformers computes it."""
    return run_to_head(model, {"input_ids": source[None], "decoder_input_ids": target[None], "use_cache": False})[0]


def _extend(model: PreTrainedModel, source: Row) -> Row:
    """Returns the sources with the virtual tokens of an adapter before each of them."""
    extended = insert_ids(model, *source)
    return source if extended is None else Row(*extended[:3])


def encode(model: PreTrainedModel, source: Row) -> tuple[ModelOutput, Row]:
    """Returns the output of the encoder for packed sources, and the sources with the virtual tokens of an adapter.

    Its ``last_hidden_state`` is ``[1, N, H]``, that of virtual tokens among it.
    """
    extended = _extend(model, source)
    return _encode(model, extended), extended


def _encode(model: PreTrainedModel, source: Row) -> ModelOutput:
    encoder: Any = model.get_encoder()
    takes = parameters(original_class(encoder))
    arguments: dict[str, Any] = {
        "input_ids": source.ids,
        "attention_mask": make_bounds(source.cu_seqlens, described=layout_of(model).described),
    }
    if "position_ids" in takes:
        arguments["position_ids"] = source.position_ids
    if "token_type_ids" in takes:
        arguments["token_type_ids"] = torch.zeros_like(source.ids)
    with _holding(model, source):
        encoded: ModelOutput = encoder(**arguments)
    return encoded


def _holding(model: PreTrainedModel, row: Row) -> AbstractContextManager[None]:
    layout, boundaries = layout_of(model), boundaries_of(model)
    if boundaries is None or not (layout.dealt or layout.has_distances):
        return nullcontext()
    return boundaries.holding(Documents.of(row.cu_seqlens))


def _forward_rows(model: PreTrainedModel, source: Row, target: Row, owners: Sequence[int] | None) -> Tensor:
    """Computes each pair in a row of its own, with the architecture's own masks and positions."""
    equal = layout_of(model).kind == "equal_rows"
    if owners is not None:
        source = _repeat_sources(source, owners)
    groups = _group_pairs(source.lengths(), target.lengths(), padding_of(model))
    sources, targets = (Documents.of_groups(row.cu_seqlens, groups) for row in (source, target))
    fill = padding_id(model.config)
    rows = []
    for ours, theirs in zip(sources.groups, targets.groups, strict=True):
        arguments: dict[str, Any] = {"use_cache": False}
        for name, group, row in (("", ours, source), ("decoder_", theirs, target)):
            arguments[f"{name}input_ids"] = group.deal(row.ids[0]).masked_fill(~group.real_DL, fill)
        if not equal:  # no token of a target sees padding, which is on the right
            arguments["attention_mask"] = ours.real_DL.long()
        rows.append(run_to_head(model, arguments))
    return targets.collect(rows)[None]


def _repeat_sources(source: Row, owners: Sequence[int]) -> Row:
    """Returns a source of its own for each target."""
    lengths = source.lengths()
    owned = [place if owner < 0 else owner for place, owner in enumerate(owners)]
    index_M = torch.cat([torch.arange(lengths[d]) + int(source.cu_seqlens[d]) for d in owned]).to(source.ids.device)
    bounds = torch.tensor([0, *(lengths[d] for d in owned)]).cumsum(0).to(source.cu_seqlens)
    return Row(source.ids[:, index_M], source.position_ids[:, index_M], bounds)


def _group_pairs(sources: Sequence[int], targets: Sequence[int], padding: float) -> list[list[int]]:
    """Groups pairs of similar lengths, longest first.

    Args:
        sources: Length of each source.
        targets: Length of each target.
        padding: Padded places per token that a group may have; 0 for pairs of equal lengths only.
    """
    order = sorted((index for index, length in enumerate(targets) if length), key=lambda i: (-sources[i], -targets[i]))
    groups: list[list[int]] = []
    for index in order:
        if groups:
            group = [*groups[-1], index]
            lengths = [[row[each] for each in group] for row in (sources, targets)]
            if sum(len(row) * max(row) for row in lengths) <= (1 + padding) * sum(map(sum, lengths)):
                groups[-1] = group
                continue
        groups.append([index])
    return groups
