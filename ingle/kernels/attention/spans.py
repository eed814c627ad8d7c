"""The keys that each token of packed documents sees, and the tiles of scores that attention is computed in.

Tiles stay in cache. Short documents share a segment, and therefore a tile, in which each row has its own first and last
key. So a thousand documents of ten tokens take about as long as ten documents of a thousand.

In cross-attention the keys are those of another packed row, with as many documents.

In trees (:mod:`ingle.kernels.attention.trees`) a tile has blocks of keys on several levels. Each block has a softmax of
its own, and the results are merged by their log-sum-exp, as those of long documents are. One tile holds tokens of
several short answers, and reads their prompt once.

Legend: N packed tokens, M packed keys, L levels (1 without trees), S keys of a segment, Hq query heads, Hkv key/value
heads, G = Hq / Hkv, Dh head size, P rows of a tile, K keys of a tile. In the grouped layout, keys and values are stored
segment by segment as [Hkv, S, Dh], and queries and outputs tile by tile as [Hkv, tokens, G, Dh], so that batched
products need no copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ingle.kernels.attention.trees import Trees

#: Documents are added to a segment until it has this many tokens.
SEGMENT_TOKENS = 128
#: Largest numbers of query tokens, keys and scores in a tile, so that they stay in cache.
TILE_TOKENS = 128
TILE_KEYS = 1024
TILE_SCORES = 1 << 21
#: Numbers of query tokens, and of keys, that a padded tile may have. Few, because each shape costs a compilation.
PADDED_SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
#: A tile of an answer may have this many tokens, so that no tile has only a few; padded tiles of trees have this size.
ANSWER_TOKENS = TILE_TOKENS + TILE_TOKENS // 4

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
class Block:
    """Keys of a tile that are computed together.

    Attributes:
        keys: Start and stop.
        segment: Start and stop of the segment of keys that contains them.
        level: 0 for the documents of the rows, 1 for those above them, ...
    """

    keys: tuple[int, int]
    segment: tuple[int, int]
    level: int = 0


@dataclass(frozen=True)
class Tile:
    """Some query tokens and the keys that any of them sees.

    Attributes:
        rows: Start and stop of the query tokens.
        blocks: The keys, from the root's on.
    """

    rows: tuple[int, int]
    blocks: tuple[Block, ...]

    @property
    def is_answer(self) -> bool:
        """Whether its tokens see keys of a document above their own."""
        return bool(self.blocks) and self.blocks[0].level > 0

    def queries(self, grouped: Tensor, heads: Heads) -> Tensor:
        """Returns [Hkv, P, Dh] of a tensor grouped by tiles, contiguous."""
        start, stop = self.rows
        return grouped[start * heads.q * heads.size : stop * heads.q * heads.size].view(heads.kv, -1, heads.size)

    def numbers(self, values: Tensor, heads: Heads) -> Tensor:
        """Returns [Hkv, P] of one number per query and head, contiguous."""
        return values[self.rows[0] * heads.q : self.rows[1] * heads.q].view(heads.kv, -1)

    def keys(self, block: Block, grouped: Tensor, heads: Heads) -> Tensor:
        """Returns [Hkv, K, Dh] of a tensor grouped by segments."""
        start, stop = block.segment
        whole = grouped[start * heads.kv * heads.size : stop * heads.kv * heads.size].view(heads.kv, -1, heads.size)
        return whole[:, block.keys[0] - start : block.keys[1] - start]

    def visible(self, block: Block, spans: AttentionSpans, num_tokens: int) -> tuple[Indices, Indices]:
        """Returns the first key of each token and one past its last key, relative to the block, int32 [num_tokens].

        Tokens beyond those of the tile see no key.
        """
        (row, end), (start, stop) = self.rows, block.keys
        bounds = np.zeros((2, num_tokens), np.int32)
        bounds[0, : end - row] = spans.first[block.level, row:end].clip(start, stop) - np.int32(start)
        bounds[1, : end - row] = spans.last[block.level, row:end].clip(start, stop) - np.int32(start)
        return bounds[0], bounds[1]


@dataclass(frozen=True)
class AttentionSpans:
    """The keys that each token sees, and the tiles that the tokens are divided into.

    Attributes:
        heads: Sizes of the heads.
        first: First key of each token in each level, int32 [L, N].
        last: One past the last key of each token in each level, int32 [L, N].
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

        def blocks_of(row: int, end: int, segment: tuple[int, int]) -> tuple[Block, ...]:
            # Neither number decreases within a segment.
            return tuple(Block(keys, segment) for keys in _cut(int(first[row]), int(last[end - 1])))

        tiles = tuple(_tiles(segments, blocks_of, heads))
        spans = first[None].astype(np.int32), last[None].astype(np.int32)
        return cls._of_tiles(heads, *spans, tiles, [keys for _, keys in segments], causal and cu_seqlens_k is None)

    @classmethod
    def of_trees(cls, trees: Trees, heads: Heads, *, window: Window, chunk: int | None = None) -> AttentionSpans:
        """Returns the spans of causal trees; makes them once.

        Args:
            trees: Which documents continue others.
            heads: Sizes of the heads.
            window: See :data:`Window`; counted along the path.
            chunk: A token sees only its own chunk of this many positions.
        """
        before, _ = reach(True, window)
        key = ("spans", heads, before, chunk)
        if key not in trees.made:
            first, last = trees.find_spans(before, chunk)
            segments = _tree_segments(trees)
            ends = np.array([stop for _, stop in segments])

            def blocks_of(row: int, end: int, _: tuple[int, int]) -> tuple[Block, ...]:
                return tuple(_tree_blocks(first[:, row:end], last[:, row:end], segments, ends))

            tiles = tuple(_tiles([(segment, segment) for segment in segments], blocks_of, heads))
            spans = first.astype(np.int32), last.astype(np.int32)
            trees.made[key] = cls._of_tiles(heads, *spans, tiles, segments, True)
        found: AttentionSpans = trees.made[key]
        return found

    @classmethod
    def _of_tiles(
        cls,
        heads: Heads,
        first: Indices,
        last: Indices,
        tiles: tuple[Tile, ...],
        segments: list[tuple[int, int]],
        causal: bool,
    ) -> AttentionSpans:
        return cls(heads, first, last, tiles, _per_token([tile.rows for tile in tiles]), _per_token(segments), causal)


def padded_size(count: int, *, is_answer: bool = False) -> int:
    """Returns the number of tokens or keys that a padded tile with ``count`` of them has."""
    if is_answer and TILE_TOKENS < count <= ANSWER_TOKENS:
        return ANSWER_TOKENS
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


def _tree_segments(trees: Trees) -> list[tuple[int, int]]:
    """Returns the keys that are stored together: short documents of one tree or of several, and short siblings.

    No segment has children of two documents outside of it, so all tokens of a tile see the same keys above.
    """
    segments: list[tuple[int, int]] = []
    first, outside = 0, -1  # the first document of the latest segment, and the one above it
    for document, parent in enumerate(trees.parents):
        start, stop = trees.bounds[document : document + 2]
        joins = bool(segments) and (parent == outside or parent >= first)
        if joins and stop - segments[-1][0] <= SEGMENT_TOKENS:
            segments[-1] = (segments[-1][0], stop)
        elif stop > start:
            segments.append((start, stop))
            first, outside = document, parent
    return segments


def _tiles(
    segments: Iterable[_Segment],
    blocks_of: Callable[[int, int, tuple[int, int]], tuple[Block, ...]],
    heads: Heads,
) -> Iterator[Tile]:
    for (start, stop), segment in segments:
        row = start
        while row < stop:
            end = min(stop, row + TILE_TOKENS)
            tile = Tile((row, end), blocks_of(row, end, segment))
            if tile.is_answer and end < stop <= row + ANSWER_TOKENS:
                end = stop
                tile = Tile((row, end), blocks_of(row, end, segment))
            while end - row > 16 and (end - row) * heads.q * _widest(tile) > TILE_SCORES:
                end = row + (end - row) // 2
                tile = Tile((row, end), blocks_of(row, end, segment))
            yield tile
            row = end


def _widest(tile: Tile) -> int:
    return max((stop - start for start, stop in (block.keys for block in tile.blocks)), default=0)


def _cut(begin: int, stop: int) -> Iterator[tuple[int, int]]:
    return itertools.pairwise([*range(begin, stop, TILE_KEYS), stop])


def _tree_blocks(
    first_LP: npt.NDArray[np.int64], last_LP: npt.NDArray[np.int64], segments: list[tuple[int, int]], ends: Indices
) -> Iterator[Block]:
    """Yields the keys that any of some tokens sees, from the root's on."""
    for level in reversed(range(len(first_LP))):
        seen = last_LP[level] > first_LP[level]
        begins, stops = first_LP[level][seen], last_LP[level][seen]
        owners = np.searchsorted(ends, begins, side="right")
        for owner in np.unique(owners).tolist():
            chosen = owners == owner
            for keys in _cut(int(begins[chosen].min()), int(stops[chosen].max())):
                yield Block(keys, segments[owner], level)


def _per_token(spans: list[tuple[int, int]]) -> Indices:
    bounds = np.array(spans, np.int32).reshape(-1, 2)
    return np.repeat(bounds, bounds[:, 1] - bounds[:, 0], axis=0)
