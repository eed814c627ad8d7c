"""Deals packed documents to the rows of small batches, and collects their results again.

Some modules cannot know where a document ends in a packed row: a recurrent state would pass from one document to the
next. They get the documents as the rows of batches, grouped by length so that little is padded.

Legend: N packed tokens, D documents of a group, L length of its longest document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ingle.kernels.attention.trees import Trees
from ingle.planning.layouts import PADDING

if TYPE_CHECKING:
    from ingle.models.forward.continued import Steps


@dataclass(frozen=True, slots=True)
class Group:
    """Documents of similar lengths, as the rows of a batch.

    Attributes:
        index_DL: The packed token at each place; padding is on the right and repeats the last token of its document,
            so that it causes neither infinities nor NaN.
        real_DL: Whether a place is no padding.
        masks: Masks made for these rows, by what they depend on.
        repeats: Whether several documents contain the same token, as the paths of trees do.
    """

    index_DL: Tensor
    real_DL: Tensor
    masks: dict[object, object] = field(default_factory=dict)
    repeats: bool = False

    def to(self, device: torch.device) -> Group:
        """Returns the group on a device."""
        index_DL, real_DL = (each.to(device, non_blocking=True) for each in (self.index_DL, self.real_DL))
        return Group(index_DL, real_DL, repeats=self.repeats)

    def deal(self, values: Tensor) -> Tensor:
        """Returns ``[N, ...]`` as ``[D, L, ...]``."""
        if self.repeats and values.is_cuda:  # its backward sorts, so that gradients are added in a fixed order
            return values[self.index_DL]
        rows: Tensor = values.index_select(0, self.index_DL.flatten()).unflatten(0, self.index_DL.shape)
        return rows


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a packed row.

    Attributes:
        groups: Cover each document once, in trees each path.
        num_tokens: N.
        place_N: The place of each packed token among the places of all groups.
        steps: The documents of trees for modules that continue from the state of a prompt.
    """

    groups: tuple[Group, ...]
    num_tokens: int
    place_N: Tensor
    steps: Steps | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor, *, padding: float = PADDING) -> Documents:
        """Groups documents by length, longest first.

        Args:
            cu_seqlens: First token of each document and the end, ``[D + 1]``.
            padding: Padded places per token that a group may have; 0 for documents of equal length only.
        """
        bounds = cu_seqlens.tolist()
        spans = sorted(((stop - start, start) for start, stop in itertools.pairwise(bounds) if stop > start))[::-1]
        return cls._of_spans(list(by_length(spans, padding)), cu_seqlens)

    @classmethod
    def of_trees(cls, trees: Trees, device: torch.device, *, padding: float = PADDING) -> Documents:
        """Groups the paths of trees by length: a prompt is dealt once for each of its answers, and collected once.

        Args:
            trees: Which documents continue others.
            device: Where the groups are.
            padding: As for :meth:`of`.
        """
        paths = trees.paths
        repeated = cls.of(paths.cu_seqlens, padding=padding)
        groups = tuple(
            Group(paths.index_M[group.index_DL], group.real_DL, repeats=True).to(device) for group in repeated.groups
        )
        place_N = repeated.place_N[paths.place_N].to(device, non_blocking=True)
        return cls(groups, trees.bounds[-1], place_N)

    @classmethod
    def of_groups(
        cls, cu_seqlens: Tensor, groups: Sequence[Sequence[int]], least: Sequence[int] | None = None
    ) -> Documents:
        """Groups documents as given.

        Args:
            cu_seqlens: As for :meth:`of`.
            groups: The numbers of the documents of each group.
            least: The least length of each group's rows.
        """
        bounds = cu_seqlens.tolist()
        spans = [[(bounds[i + 1] - bounds[i], bounds[i]) for i in group] for group in groups]
        return cls._of_spans(spans, cu_seqlens, least)

    @classmethod
    def _of_spans(
        cls, spans: list[list[tuple[int, int]]], cu_seqlens: Tensor, least: Sequence[int] | None = None
    ) -> Documents:
        device = cu_seqlens.device
        # On the CPU, as a mask of other shape makes a GPU wait.
        groups = [_group(each, width) for each, width in zip(spans, least or [1] * len(spans), strict=True)]
        index_P = torch.cat([group.index_DL.flatten() for group in groups])
        real_P = torch.cat([group.real_DL.flatten() for group in groups])
        places = real_P.nonzero()[:, 0]
        place_N = torch.empty_like(places)
        place_N[index_P[places]] = places
        return cls(tuple(groups), len(place_N), place_N).to(device)

    def to(self, device: torch.device) -> Documents:
        """Returns the documents on a device."""
        groups = tuple(group.to(device) for group in self.groups)
        return Documents(groups, self.num_tokens, self.place_N.to(device, non_blocking=True))

    def collect(self, parts: list[Tensor]) -> Tensor:
        """Returns the packed values ``[N, ...]`` of groups ``[D, L, ...]``."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.place_N)


class Boundaries:
    """Holds the documents of the batch that a model computes; all its dealt modules share it.

    Attributes:
        current: None outside a packed forward pass, as in generation.
    """

    def __init__(self) -> None:
        self.current: Documents | None = None

    @contextmanager
    def holding(self, documents: Documents | None) -> Iterator[None]:
        """Holds these documents inside the block."""
        before, self.current = self.current, documents
        try:
            yield
        finally:
            self.current = before


def by_length(spans: list[tuple[int, int]], padding: float) -> Iterator[list[tuple[int, int]]]:
    """Groups pairs of a length and a number, longest first; ends a group where it would have too much padding."""
    group: list[tuple[int, int]] = []
    real = 0
    for length, start in spans:
        if group and group[0][0] * (len(group) + 1) > (1 + padding) * (real + length):
            yield group
            group, real = [], 0
        group.append((length, start))
        real += length
    if group:
        yield group


def _group(spans: list[tuple[int, int]], least: int) -> Group:
    length_D1, start_D1 = (torch.tensor(column)[:, None] for column in zip(*spans, strict=True))
    place_1L = torch.arange(max(least, int(length_D1.max())))[None]
    index_DL = start_D1 + torch.minimum(place_1L, length_D1 - 1)
    return Group(index_DL, place_1L < length_D1)
