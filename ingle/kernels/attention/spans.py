"""The keys that each token of packed documents sees, and the tiles of scores that attention is computed in.

Tiles stay in cache. Short documents share a segment, and therefore a tile, in which each row has its own first and last
key. So a thousand documents of ten tokens take about as long as ten documents of a thousand.

Legend: N packed tokens, S tokens of a segment, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head size, P rows
of a tile, K keys of a tile. In the grouped layout, keys and values are stored segment by segment as [Hkv, S, Dh], and
queries and outputs tile by tile as [Hkv, tokens, G, Dh], so that batched products need no copies.
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

Indices = npt.NDArray[np.int32]


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
        segment: Start and stop of the segment that contains all of them.
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

    def visible(self, block: tuple[int, int], spans: AttentionSpans) -> tuple[Indices, Indices]:
        """Returns the first key of each row's token and one past its last key, relative to the block."""
        rows, (start, stop) = slice(*self.rows), block
        return spans.first[rows].clip(start, stop) - np.int32(start), spans.last[rows].clip(start, stop) - np.int32(
            start
        )


@dataclass(frozen=True)
class AttentionSpans:
    """The keys that each token sees, and the tiles that the tokens are divided into.

    Attributes:
        heads: Sizes of the heads.
        first: First key of each token, int32 [N]; never decreases.
        last: One past the last key of each token, int32 [N]; never decreases within a segment.
        tiles: Tiles, which together cover each token once.
        by_tile: Start and stop of each token's tile, int32 [N, 2].
        by_segment: Start and stop of each token's segment, int32 [N, 2].
    """

    heads: Heads
    first: Indices
    last: Indices
    tiles: tuple[Tile, ...]
    by_tile: Indices
    by_segment: Indices

    @classmethod
    def of(cls, cu_seqlens: Tensor, heads: Heads, *, causal: bool, window: int | None) -> AttentionSpans:
        """Returns the spans of documents with these boundaries, int [D + 1]."""
        bounds = cu_seqlens.numpy().astype(np.int32)
        lengths = np.diff(bounds)
        window = None if window is None else min(window, int(bounds[-1]))  # a config may name any number
        index = np.arange(bounds[-1], dtype=np.int32)
        start, stop = np.repeat(bounds[:-1], lengths), np.repeat(bounds[1:], lengths)
        first = start if window is None else np.maximum(start, index - np.int32(window - 1))
        last = stop if window is None else np.minimum(stop, index + np.int32(window))
        last = index + np.int32(1) if causal else last
        segments = _segments(bounds.tolist())
        tiles = tuple(_tiles(first, last, segments, heads))
        return cls(
            heads,
            first.astype(np.int32),
            last.astype(np.int32),
            tiles,
            _per_token([tile.rows for tile in tiles]),
            _per_token(segments),
        )


def _segments(bounds: list[int]) -> list[tuple[int, int]]:
    segments: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(bounds):
        if segments and stop - segments[-1][0] <= SEGMENT_TOKENS:
            segments[-1] = (segments[-1][0], stop)
        elif stop > start:
            segments.append((start, stop))
    return segments


def _tiles(first: Indices, last: Indices, segments: list[tuple[int, int]], heads: Heads) -> Iterator[Tile]:
    for start, stop in segments:
        row = start
        while row < stop:
            begin, end = int(first[row]), min(stop, row + TILE_TOKENS)
            while end - row > 16 and (end - row) * heads.q * min(int(last[end - 1]) - begin, TILE_KEYS) > TILE_SCORES:
                end = row + (end - row) // 2
            cuts = [*range(begin, int(last[end - 1]), TILE_KEYS), int(last[end - 1])]
            yield Tile((row, end), tuple(itertools.pairwise(cuts)), (start, stop))
            row = end


def _per_token(spans: list[tuple[int, int]]) -> Indices:
    bounds = np.array(spans, np.int32).reshape(-1, 2)
    return np.repeat(bounds, bounds[:, 1] - bounds[:, 0], axis=0)
