"""Moves rows between the layout by token and the grouped layout of attention, and rotates them on the way.

Legend: as in :mod:`ingle.kernels.attention.spans`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from ingle.kernels.attention.spans import AttentionSpans, Heads, Indices
from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import bits, load, store
from ingle.kernels.threads import match_threads


def group_rows(source_NHD: Tensor, by: Indices, heads: Heads, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Converts [N, H, Dh] to the grouped layout, flat.

    Args:
        source_NHD: Queries, keys or values; any strides over N and H.
        by: ``spans.by_tile`` for tensors with query heads, ``spans.by_segment`` for others.
        heads: Sizes.
        rotary: cos and sin, [N, Dh], of rotary position embeddings to apply (Su et al. 2021, arXiv 2104.09864).
    """
    out = torch.empty(source_NHD.shape.numel(), dtype=source_NHD.dtype)
    match_threads(len(out))
    _group(bits(source_NHD), by, source_NHD.shape[1] // heads.kv, *_rotary(rotary, source_NHD), bits(out))
    return out


def ungroup_rows(
    grouped: Tensor, out_NHD: Tensor, by: Indices, heads: Heads, rotary: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Converts the grouped layout to [N, H, Dh]; with ``rotary``, rotates back, which is the gradient of a rotation.

    Args:
        grouped: float32 or the dtype of ``out``.
        out_NHD: Written; any strides over N and H.
        by: As for :func:`group_rows`.
        heads: Sizes.
        rotary: As for :func:`group_rows`.
    """
    match_threads(len(grouped))
    _ungroup(bits(grouped), by, out_NHD.shape[1] // heads.kv, *_rotary(rotary, out_NHD), bits(out_NHD))
    return out_NHD


def group_gradient(grad_NHD: Tensor, out_NHD: Tensor, spans: AttentionSpans) -> tuple[Tensor, Tensor]:
    """Returns the grouped gradient of the outputs, and each row's sum of gradient times output, float32 [N * Hq]."""
    grouped = torch.empty(grad_NHD.shape.numel(), dtype=grad_NHD.dtype)
    delta = torch.empty(grad_NHD.shape[0] * spans.heads.q, dtype=torch.float32)
    match_threads(len(grouped))
    _group_gradient(bits(grad_NHD), bits(out_NHD), spans.by_tile, spans.heads.group, bits(grouped), delta.numpy())
    return grouped, delta


def _rotary(rotary: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Any, Any]:
    if rotary is None:
        nothing = bits(torch.empty(0, 0, dtype=like.dtype))
        return nothing, nothing
    return bits(rotary[0]), bits(rotary[1])


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
