"""Packed attention on a CPU: oneDNN multiplies tiles of scores, numba does everything between the products.

torch's own CPU attention reaches a tenth of the rate its matrix products reach. Here documents become tiles,
[tokens x heads of a group] by [keys], that stay in cache: one batched product for the scores of all key/value
heads, one pass that masks and exponentiates in place, one product with the values. Short documents share a tile
(each row knows its first and last key), so a thousand documents of ten tokens cost as little as ten of a thousand.

Queries of a group read the same keys, so they are laid one under another and keys are never repeated.

Legend: N packed tokens, S tokens of a segment, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Dh head size,
P rows of a tile, K keys of a tile. Grouped means, for keys and values: segment by segment [Hkv, S, Dh]; for
queries and what goes with them: tile by tile [Hkv, tokens, G, Dh], so that batched products take them as they lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ingle.kernels.bfloat16 import FAST, bits, exp, largest, load, njit, prange, store
from ingle.kernels.cpu_cache import compile_float_kernel
from ingle.kernels.cpu_threads import match_threads

#: Documents are put together into a segment until it has this many tokens.
SEGMENT_TOKENS = 128
#: Most query tokens and most keys of a tile, and the number of scores it should not exceed (they should stay in cache).
TILE_TOKENS = 128
TILE_KEYS = 1024
TILE_SCORES = 1 << 21

Indices = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Scores:
    """What is done to ``q k^T`` before the softmax.

    Attributes:
        scale: Factor.
        softcap: ``softcap * tanh(score / softcap)`` after it; 0 for none.
    """

    scale: float
    softcap: float = 0.0


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
    """Some tokens that ask and the keys any of them sees, block by block; spans are start and stop in tokens.

    Attributes:
        rows: The tokens that ask.
        blocks: The tokens that answer.
        segment: The segment all of them are in.
    """

    rows: tuple[int, int]
    blocks: tuple[tuple[int, int], ...]
    segment: tuple[int, int]

    def queries(self, grouped: Tensor, heads: Heads) -> Tensor:
        """[Hkv, P, Dh] of a tensor grouped by tiles, contiguous."""
        start, stop = self.rows
        return grouped[start * heads.q * heads.size : stop * heads.q * heads.size].view(heads.kv, -1, heads.size)

    def numbers(self, values: Tensor, heads: Heads) -> Tensor:
        """[Hkv, P] of one number a query and head, contiguous."""
        return values[self.rows[0] * heads.q : self.rows[1] * heads.q].view(heads.kv, -1)

    def keys(self, block: tuple[int, int], grouped: Tensor, heads: Heads) -> Tensor:
        """[Hkv, K, Dh] of a tensor grouped by segments."""
        start, stop = self.segment
        whole = grouped[start * heads.kv * heads.size : stop * heads.kv * heads.size].view(heads.kv, -1, heads.size)
        return whole[:, block[0] - start : block[1] - start]

    def visible(self, block: tuple[int, int], reach: Reach) -> tuple[Indices, Indices]:
        """First key and one past the last of each row's token, counted from the block's first."""
        rows, (start, stop) = slice(*self.rows), block
        return reach.first[rows].clip(start, stop) - np.int32(start), reach.last[rows].clip(start, stop) - np.int32(
            start
        )


@dataclass(frozen=True)
class Reach:
    """Which keys every token sees, and how the tokens are cut.

    Attributes:
        heads: Sizes.
        first: First key of each token, int32 [N]; never decreases.
        last: One past its last key, int32 [N]; never decreases within a segment.
        tiles: They cover every token once.
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
    def of(cls, cu_seqlens: Tensor, heads: Heads, *, causal: bool, window: int | None) -> Reach:
        """Reads document boundaries, int [D + 1]."""
        bounds = cu_seqlens.numpy().astype(np.int32)
        lengths = np.diff(bounds)
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


def attend(q: Tensor, k: Tensor, v: Tensor, reach: Reach, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention over grouped, flat tensors.

    Args:
        q: [N * Hq * Dh], grouped by tiles.
        k: [N * Hkv * Dh], grouped by segments.
        v: [N * Hkv * Dh], likewise.
        reach: Who sees what.
        scores: What happens to the scores.

    Returns:
        The outputs, grouped like ``q``, and the log-sum-exp of each row's scores, float32 [N * Hq] in that layout.
    """
    heads = reach.heads
    out, lse = torch.empty_like(q), torch.empty(len(q) // heads.size, dtype=torch.float32)
    scratch = torch.empty(0, dtype=q.dtype)
    for tile in reach.tiles:
        queries, tile_out, tile_lse = tile.queries(q, heads), tile.queries(out, heads), tile.numbers(lse, heads)
        merged = _Merged(tile_out, tile_lse) if len(tile.blocks) > 1 else None
        for block in tile.blocks:
            keys = tile.keys(block, k, heads).contiguous()
            scratch, (weights, rest) = _take(scratch, (heads.kv, queries.shape[1], keys.shape[1]), 2)
            rest = _multiply(queries, keys, weights, rest)
            match_threads(weights.numel())
            _exponentiate(
                bits(weights),
                bits(rest),
                *tile.visible(block, reach),
                np.float32(scores.scale),
                np.float32(scores.softcap),
                tile_lse.numpy(),
            )
            torch.bmm(weights, tile.keys(block, v, heads), out=tile_out)
            if merged is not None:
                merged.add()
        if merged is not None:
            merged.finish()
    return out, lse


class _Merged:
    """Outputs over several blocks of keys: each block's softmax has its own sum, which is made up for here.

    Args:
        out: [Hkv, P, Dh] of the block last computed; :meth:`finish` puts the merged outputs there.
        lse: [Hkv, P] likewise.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self._out, self._lse = out, lse
        self._total = torch.zeros(out.shape, dtype=torch.float32)
        self._total_lse = torch.full(lse.shape, -torch.inf)

    def add(self) -> None:
        """Takes the block in."""
        match_threads(self._out.numel())
        arrays = (self._total, self._total_lse, self._out, self._lse)
        _merge(*(bits(tensor.flatten(0, 1)) for tensor in arrays))

    def finish(self) -> None:
        """Writes the outputs over all blocks and their log-sum-exp."""
        self._out.copy_(self._total)
        self._lse.copy_(self._total_lse)


def attend_backward(
    grad_out: Tensor, delta: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, reach: Reach, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, grouped; the softmax is computed again from its log-sum-exp.

    Args:
        grad_out: Gradient of the outputs, grouped by tiles.
        delta: Sum of gradient times output of each row, float32 [N * Hq].
        lse: As :func:`attend` returned it.
        q: As given to :func:`attend`.
        k: Likewise.
        v: Likewise.
        reach: Likewise.
        scores: Likewise.

    Source: Dao et al. 2022, "FlashAttention" (arXiv 2205.14135), algorithm 4.
    """
    heads = reach.heads
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=torch.float32) for t in (k, v))
    scratch = torch.empty(0, dtype=q.dtype)
    for tile in reach.tiles:
        queries, grads, tile_grad_q = (tile.queries(grouped, heads) for grouped in (q, grad_out, grad_q))
        total = torch.zeros(queries.shape, dtype=torch.float32) if len(tile.blocks) > 1 else None
        for block in tile.blocks:
            keys = tile.keys(block, k, heads).contiguous()
            scratch, (weights, slopes, rest) = _take(scratch, (heads.kv, queries.shape[1], keys.shape[1]), 3)
            torch.bmm(grads, tile.keys(block, v, heads).transpose(1, 2), out=slopes)
            rest = _multiply(queries, keys, weights, rest)
            match_threads(weights.numel())
            _differentiate(
                bits(weights),
                bits(rest),
                bits(slopes),
                *tile.visible(block, reach),
                np.float32(scores.scale),
                np.float32(scores.softcap),
                tile.numbers(lse, heads).numpy(),
                tile.numbers(delta, heads).numpy(),
            )
            tile.keys(block, grad_v, heads).add_(torch.bmm(weights.transpose(1, 2), grads))
            tile.keys(block, grad_k, heads).add_(torch.bmm(slopes.transpose(1, 2), queries))
            torch.bmm(slopes, keys, out=tile_grad_q)
            if total is not None:
                total += tile_grad_q
        if total is not None:
            tile_grad_q.copy_(total)
    return grad_q, grad_k, grad_v


def _multiply(queries: Tensor, keys: Tensor, scores: Tensor, rest: Tensor) -> Tensor:
    """``q k^T`` into ``scores``, and what rounding to bfloat16 took from it into ``rest``.

    A score of 20 in bfloat16 is off by up to 1/16, its softmax by 6 %. The product adds up in float32 before it
    rounds, so a second one that starts from minus the first leaves just the error. In float32 there is none to
    speak of and ``rest`` comes back empty.
    """
    torch.bmm(queries, keys.transpose(1, 2), out=scores)
    if scores.dtype == torch.float32:
        return rest[:0]
    return torch.baddbmm(scores, queries, keys.transpose(1, 2), beta=-1, out=rest)


def _take(scratch: Tensor, shape: tuple[int, int, int], count: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    size = shape[0] * shape[1] * shape[2]
    if len(scratch) < count * size:
        scratch = torch.empty(count * size, dtype=scratch.dtype)
    return scratch, tuple(scratch[i * size : (i + 1) * size].view(shape) for i in range(count))


def group_rows(source_NHD: Tensor, by: Indices, heads: Heads, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[N, H, Dh] -> grouped and flat, rotated on the way.

    Args:
        source_NHD: Queries, or keys or values; any strides over N and H.
        by: ``reach.by_tile`` for what has query heads, ``reach.by_segment`` for the rest.
        heads: Sizes.
        rotary: cos and sin, [N, Dh], of rotary position embeddings (Su et al. 2021, arXiv 2104.09864).
    """
    out = torch.empty(source_NHD.shape.numel(), dtype=source_NHD.dtype)
    match_threads(len(out))
    _group(bits(source_NHD), by, source_NHD.shape[1] // heads.kv, *_rotary(rotary, source_NHD), bits(out))
    return out


def ungroup_rows(
    grouped: Tensor, out_NHD: Tensor, by: Indices, heads: Heads, rotary: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Grouped and flat -> [N, H, Dh]; with ``rotary``, turned back by the angles (the gradient of the turn).

    Args:
        grouped: float32 or the dtype of ``out``.
        out_NHD: Where to, any strides over N and H.
        by: As for :func:`group_rows`.
        heads: Sizes.
        rotary: As for :func:`group_rows`.
    """
    match_threads(len(grouped))
    _ungroup(bits(grouped), by, out_NHD.shape[1] // heads.kv, *_rotary(rotary, out_NHD), bits(out_NHD))
    return out_NHD


def group_gradient(grad_NHD: Tensor, out_NHD: Tensor, reach: Reach) -> tuple[Tensor, Tensor]:
    """The gradient of the outputs, grouped, and each row's sum of gradient times output, float32 [N * Hq]."""
    grouped = torch.empty(grad_NHD.shape.numel(), dtype=grad_NHD.dtype)
    delta = torch.empty(grad_NHD.shape[0] * reach.heads.q, dtype=torch.float32)
    match_threads(len(grouped))
    _group_gradient(bits(grad_NHD), bits(out_NHD), reach.by_tile, reach.heads.group, bits(grouped), delta.numpy())
    return grouped, delta


def _rotary(rotary: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Any, Any]:
    if rotary is None:
        nothing = bits(torch.empty(0, 0, dtype=like.dtype))
        return nothing, nothing
    return bits(rotary[0]), bits(rotary[1])


@compile_float_kernel
def _exponentiate(weights, rest, first, last, scale, softcap, lse):  # type: ignore[no-untyped-def]
    """Raw scores (``weights + rest``) -> softmax in ``weights``; zero where a row does not see a key."""
    num_heads, num_rows, num_keys = weights.shape
    group = num_rows // first.shape[0]
    for index in prange(num_heads * first.shape[0]):
        head, token = index // first.shape[0], index % first.shape[0]
        buffer = np.empty(num_keys, np.float32)
        for r in range(token * group, (token + 1) * group):
            more = rest[head, r] if rest.shape[0] > 0 else weights[head, r, :0]
            lse[head, r] = _softmax(weights[head, r], more, first[token], last[token], scale, softcap, buffer)


@compile_float_kernel
def _differentiate(weights, rest, slopes, first, last, scale, softcap, lse, delta):  # type: ignore[no-untyped-def]
    """Raw scores (``weights + rest``) -> softmax, gradients of the softmax -> gradients of the raw scores."""
    num_heads, num_rows, num_keys = weights.shape
    group = num_rows // first.shape[0]
    for index in prange(num_heads * first.shape[0]):
        head, token = index // first.shape[0], index % first.shape[0]
        buffer = np.empty(num_keys, np.float32)
        for r in range(token * group, (token + 1) * group):
            more = rest[head, r] if rest.shape[0] > 0 else weights[head, r, :0]
            row, slope = weights[head, r], slopes[head, r]
            begin, end = first[token], last[token]
            _softmax_backward(row, more, slope, begin, end, scale, softcap, lse[head, r], delta[head, r], buffer)


# One row each, as functions of their own: inside a parallel function the compiler rewrites these loops. They run over
# slices from 0, as only such loops become vector code.


@njit(fastmath=FAST, error_model="numpy")
def _softmax(row, rest, begin, end, scale, softcap, buffer):  # type: ignore[no-untyped-def]
    seen, values = row[begin:end], buffer[: end - begin]
    if begin >= end:
        row[:] = 0
        return np.float32(-np.inf)
    _bend_all(seen, rest, begin, end, scale, softcap, values)
    top = largest(values)
    total = np.float32(0.0)
    for j in range(len(values)):
        weight = exp(values[j] - top)
        values[j] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for j in range(len(values)):
        store(seen, j, values[j] * inverse)
    row[:begin] = 0
    row[end:] = 0
    return top + np.log(total)


@njit(fastmath=FAST, error_model="numpy")
def _softmax_backward(row, rest, slope, begin, end, scale, softcap, lse, delta, buffer):  # type: ignore[no-untyped-def]
    seen, steep, values = row[begin:end], slope[begin:end], buffer[: end - begin]
    _bend_all(seen, rest, begin, end, scale, softcap, values)
    for j in range(len(values)):
        weight = exp(values[j] - lse)
        store(seen, j, weight)
        bent = values[j] / softcap if softcap > np.float32(0.0) else np.float32(0.0)
        store(steep, j, weight * (load(steep, j) - delta) * scale * (np.float32(1.0) - bent * bent))
    row[:begin] = 0
    row[end:] = 0
    slope[:begin] = 0
    slope[end:] = 0


@njit(fastmath=FAST, error_model="numpy")
def _bend_all(seen, rest, begin, end, scale, softcap, values):  # type: ignore[no-untyped-def]
    """Raw scores -> scaled and capped ones in float32."""
    if len(rest) > 0:
        more = rest[begin:end]
        for j in range(len(values)):
            values[j] = (load(seen, j) + load(more, j)) * scale
    else:
        for j in range(len(values)):
            values[j] = load(seen, j) * scale
    if softcap > np.float32(0.0):
        for j in range(len(values)):
            tanh = np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * values[j] / softcap) + np.float32(1.0))
            values[j] = softcap * tanh


@compile_float_kernel
def _merge(total, total_lse, out, lse):  # type: ignore[no-untyped-def]
    """Adds a block's outputs to those of the blocks before, each in proportion to its sum of exponentials."""
    for r in prange(len(lse)):
        before, more = total_lse[r], lse[r]
        if more != np.float32(-np.inf):
            top = max(before, more)
            both = top + np.log(exp(before - top) + exp(more - top))
            _mix(total[r], exp(before - both), out[r], exp(more - both))
            total_lse[r] = both


@njit(fastmath=FAST)
def _mix(total, keep, out, share):  # type: ignore[no-untyped-def]
    for j in range(len(total)):
        total[j] = total[j] * keep + load(out, j) * share


@compile_float_kernel
def _group(source, bounds, group, cos, sin, out):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, size = source.shape
    half = size // 2
    rotate = cos.shape[0] > 0
    for t in prange(num_tokens):
        start, stop = bounds[t, 0], bounds[t, 1]
        base = start * num_heads * size + (t - start) * group * size
        stride = (stop - start) * group * size
        for h in range(num_heads):
            row = source[t, h]
            at = base + h // group * stride + h % group * size
            to = out[at : at + size]
            if rotate:
                c, s = cos[t], sin[t]
                for j in range(half):
                    a, b = load(row, j), load(row, j + half)
                    store(to, j, a * load(c, j) - b * load(s, j))
                    store(to, j + half, b * load(c, j + half) + a * load(s, j + half))
            else:
                for j in range(size):
                    to[j] = row[j]


@compile_float_kernel
def _ungroup(grouped, bounds, group, cos, sin, out):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, size = out.shape
    half = size // 2
    rotate = cos.shape[0] > 0
    for t in prange(num_tokens):
        start, stop = bounds[t, 0], bounds[t, 1]
        base = start * num_heads * size + (t - start) * group * size
        stride = (stop - start) * group * size
        for h in range(num_heads):
            to = out[t, h]
            at = base + h // group * stride + h % group * size
            row = grouped[at : at + size]
            if rotate:
                c, s = cos[t], sin[t]
                for j in range(half):
                    a, b = load(row, j), load(row, j + half)
                    store(to, j, a * load(c, j) + b * load(s, j + half))
                    store(to, j + half, b * load(c, j + half) - a * load(s, j))
            else:
                for j in range(size):
                    store(to, j, load(row, j))


@compile_float_kernel
def _group_gradient(grad, out, bounds, group, grouped, delta):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, size = grad.shape
    for t in prange(num_tokens):
        start, stop = bounds[t, 0], bounds[t, 1]
        for h in range(num_heads):
            g, o = grad[t, h], out[t, h]
            at = start * num_heads + h // group * (stop - start) * group + (t - start) * group + h % group
            to = grouped[at * size : (at + 1) * size]
            total = np.float32(0.0)
            for j in range(size):
                total += load(g, j) * load(o, j)
                to[j] = g[j]
            delta[at] = total
