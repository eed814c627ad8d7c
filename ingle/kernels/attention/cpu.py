"""Packed attention on a CPU: oneDNN multiplies tiles of scores, numba does everything between the products.

torch's own CPU attention reaches a tenth of the rate its matrix products reach. Here documents become tiles,
[tokens x heads of a group] by [keys], that stay in cache: one batched product for the scores of all key/value
heads, one pass that masks and exponentiates in place, one product with the values.

Queries of a group read the same keys, so they are laid one under another and keys are never repeated.

Legend: as in :mod:`ingle.kernels.attention.tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ingle.kernels.attention.softmax import differentiate, exponentiate, merge
from ingle.kernels.attention.tiles import Reach
from ingle.kernels.numba.scalars import bits
from ingle.kernels.threads import match_threads


@dataclass(frozen=True)
class Scores:
    """What is done to ``q k^T`` before the softmax.

    Attributes:
        scale: Factor.
        softcap: ``softcap * tanh(score / softcap)`` after it; 0 for none.
    """

    scale: float
    softcap: float = 0.0


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
            exponentiate(
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
        merge(*(bits(tensor.flatten(0, 1)) for tensor in arrays))

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
            differentiate(
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
