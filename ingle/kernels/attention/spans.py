"""The keys that each token of packed documents sees, and the tiles of scores that attention is computed in.

Tiles stay in cache. Short documents share a segment, and therefore a tile, in which each row has its own first and last
key. So a thousand documents of ten tokens take about as long as ten documents of a thousand.

In cross-attention the keys are those of another packed row, with as many documents.

Legend: N packed tokens, M packed keys, S keys of a segment, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head
size, P rows of a tile, K keys of a tile. In the grouped layout, keys and values are stored segment by segment as
[Hkv, S, Dh], and queries and outputs tile by tile as [Hkv, tokens, G, Dh], so that batched products need no copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

#: Documents are added to a segment until it has this many tokens.
SEGMENT_TOKENS = 128
#: Largest numbers of query tokens, keys and scores in a tile, so that they stay in cache.
TILE_TOKENS = 128
TILE_KEYS = 1024
TILE_SCORES = 1 << 21
#: Numbers of query tokens, and of keys, that a padded tile may have. Few, because each shape costs a compilation.
PADDED_SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Indices = npt.NDArray[np.int32]

#: Number of tokens that a token sees, including itself (on either side if not causal), or how many it sees before
#: itself and after itself. None means all of its document.
Window = int | tuple[int | None, int | None] | None


def reach(causal: bool, window: Window) -> tuple[int | None, int | None]:
    """Returns how many tokens before itself and after itself a token sees; None for all of its document."""
    if isinstance(window, tuple):
        before, after = window
        return before, 0 if causal else after
    before_or_after = None if window is None else window - 1
    return before_or_after, 0 if causal else before_or_after


@dataclass(frozen=True)
class Heads:
    """Sizes of the attention: query heads, key/value heads, head size."""

    q: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """Query heads that read one key/value head."""
        return self.q // self.kv


@dataclass(frozen=True)
class Tile:
    """Some query tokens and the keys that any of them sees.

    Attributes:
        rows: Start and stop of the query tokens.
        blocks: Start and stop of each block of keys.
        segment: Start and stop of the segment of keys that contains all of them.
    """

    rows: tuple[int, int]
    blocks: tuple[tuple[int, int], ...]
    segment: tuple[int, int]

    def queries(self, grouped: Tensor, heads: Heads) -> Tensor:
        """Returns [Hkv, P, Dh] of a tensor grouped by tiles, contiguous."""
        start, stop = self.rows
        return grouped[start * heads.q * heads.size : stop * heads.q * heads.size].view(heads.kv, -1, heads.size)

    def numbers(self, values: Tensor, heads: Heads) -> Tensor:
        """Returns [Hkv, P] of one number per query and head, contiguous."""
        return values[self.rows[0] * heads.q : self.rows[1] * heads.q].view(heads.kv, -1)

    def keys(self, block: tuple[int, int], grouped: Tensor, heads: Heads) -> Tensor:
        """Returns [Hkv, K, Dh] of a tensor grouped by segments."""
        start, stop = self.segment
        whole = grouped[start * heads.kv * heads.size : stop * heads.kv * heads.size].view(heads.kv, -1, heads.size)
        return whole[:, block[0] - start : block[1] - start]

    def visible(self, block: tuple[int, int], spans: AttentionSpans, num_tokens: int) -> tuple[Indices, Indices]:
        """Returns the first key of each token and one past its last key, relative to the block, int32 [num_tokens].

        Tokens beyond those of the tile see no key.
        """
        (row, end), (start, stop) = self.rows, block
        bounds = np.zeros((2, num_tokens), np.int32)
        bounds[0, : end - row] = spans.first[row:end].clip(start, stop) - np.int32(start)
        bounds[1, : end - row] = spans.last[row:end].clip(start, stop) - np.int32(start)
        return bounds[0], bounds[1]


@dataclass(frozen=True)
class AttentionSpans:
    """The keys that each token sees, and the tiles that the tokens are divided into.

    Attributes:
        heads: Sizes of the heads.
        first: First key of each token, int32 [N]; never decreases.
        last: One past the last key of each token, int32 [N]; never decreases within a segment.
        tiles: Tiles, which together cover each token once.
        by_tile: Start and stop of each token's tile, int32 [N, 2].
        by_segment: Start and stop of each key's segment, int32 [M, 2].
        causal: Whether no token sees a later one.
    """

    heads: Heads
    first: Indices
    last: Indices
    tiles: tuple[Tile, ...]
    by_tile: Indices
    by_segment: Indices
    causal: bool = True

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, heads: Heads, *, causal: bool, window: Window, cu_seqlens_k: Tensor | None = None
    ) -> AttentionSpans:
        """Returns the spans of documents with these boundaries, int [D + 1].

        Args:
            cu_seqlens: Boundaries of the documents of the queries.
            heads: Sizes of the heads.
            causal: Whether a token sees no later token.
            window: See :data:`Window`.
            cu_seqlens_k: Boundaries of the keys in cross-attention, where a query sees all keys of its document.
        """
        bounds = cu_seqlens.numpy().astype(np.int32)
        bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.numpy().astype(np.int32)
        lengths = np.diff(bounds)
        first, last = np.repeat(bounds_k[:-1], lengths), np.repeat(bounds_k[1:], lengths)
        if cu_seqlens_k is None:
            index = np.arange(bounds[-1], dtype=np.int32)
            # A config may name any number.
            before, after = (None if n is None else np.int32(min(n, bounds[-1])) for n in reach(causal, window))
            first = first if before is None else np.maximum(first, index - before)
            last = last if after is None else np.minimum(last, index + after + np.int32(1))
        segments = _segments(bounds.tolist(), bounds_k.tolist())
        tiles = tuple(_tiles(first, last, segments, heads))
        return cls(
            heads,
            first.astype(np.int32),
            last.astype(np.int32),
            tiles,
            _per_token([tile.rows for tile in tiles]),
            _per_token([keys for _, keys in segments]),
            causal and cu_seqlens_k is None,
        )


def padded_size(count: int) -> int:
    """Returns the number of tokens or keys that a padded tile with ``count`` of them has."""
    return next((size for size in PADDED_SIZES if size >= count), count)


#: Start and stop of some documents among the queries, and among the keys.
_Segment = tuple[tuple[int, int], tuple[int, int]]


def _segments(bounds: list[int], bounds_k: list[int]) -> list[_Segment]:
    segments: list[_Segment] = []
    for (start, stop), (start_k, stop_k) in zip(itertools.pairwise(bounds), itertools.pairwise(bounds_k), strict=True):
        if segments and max(stop - segments[-1][0][0], stop_k - segments[-1][1][0]) <= SEGMENT_TOKENS:
            segments[-1] = ((segments[-1][0][0], stop), (segments[-1][1][0], stop_k))
        elif stop > start or stop_k > start_k:
            segments.append(((start, stop), (start_k, stop_k)))
    return segments


def _tiles(first: Indices, last: Indices, segments: list[_Segment], heads: Heads) -> Iterator[Tile]:
    for (start, stop), segment in segments:
        row = start
        while row < stop:
            begin, end = int(first[row]), min(stop, row + TILE_TOKENS)
            while end - row > 16 and (end - row) * heads.q * min(int(last[end - 1]) - begin, TILE_KEYS) > TILE_SCORES:
                end = row + (end - row) // 2
            cuts = [*range(begin, int(last[end - 1]), TILE_KEYS), int(last[end - 1])]
            yield Tile((row, end), tuple(itertools.pairwise(cuts)), segment)
            row = end


def _per_token(spans: list[tuple[int, int]]) -> Indices:
    bounds = np.array(spans, np.int32).reshape(-1, 2)
    return np.repeat(bounds, bounds[:, 1] - bounds[:, 0], axis=0)
