"""Attention within trees of packed documents: exact, and no token sees another answer or another tree.

Legend: as in :mod:`ingle.kernels.attention.packed` and :mod:`ingle.kernels.attention.trees`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ingle.kernels.attention import flex
from ingle.kernels.attention.cpu import Scores
from ingle.kernels.attention.packed import attend_spans, packed_attention
from ingle.kernels.attention.spans import AttentionSpans, Heads, Window
from ingle.kernels.attention.trees import Trees
from ingle.kernels.numba.scalars import supported


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trees: Trees,
    *,
    scale: float,
    window: Window = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    returns_lse: bool = False,
) -> Any:
    """Computes causal :func:`~ingle.kernels.attention.packed.packed_attention` along the paths of trees.

    A CPU has its own kernels, and a CUDA device runs FlexAttention. Elsewhere, in float64 and with a bias, prompts are
    repeated for each answer.

    Args:
        q: [1, Hq, N, Dh]; this and all other arguments but ``chunk`` are those of ``packed_attention``.
        k: [1, Hkv, N, Dh].
        v: [1, Hkv, N, Dv].
        trees: Which documents continue others.
        scale: Factor on the scores.
        window: Counted along the path.
        chunk: A token sees only its own chunk of this many positions of its path (Llama 4).
        softcap: Bound on the scores.
        sinks: [Hq]; scores of one more key.
        bias: [Hq, 2L - 1]; added to the scores by distance along the path.
        returns_lse: Return the log-sum-exp of the scores, too.

    Returns:
        [1, N, Hq, Dv]; and if asked, the log-sum-exp with its gradient, at least float32 [N, Hq].
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    options["returns_lse"] = returns_lse
    if bias is not None:
        return _attend_by_path(q, k, v, trees, chunk, **options, bias=bias)
    if v.shape[3] != q.shape[3] and q.dtype != torch.float64:
        sizes = (q.shape[3], v.shape[3])
        q, k, v = (pad(t, (0, max(sizes) - t.shape[3])) for t in (q, k, v))
        wide = tree_attention(q, k, v, trees, chunk=chunk, **options)
        return (wide[0][..., : sizes[1]], wide[1]) if returns_lse else wide[..., : sizes[1]]
    if supported(q, k, v):
        return _attend_on_cpu(q, k, v, sinks, trees, window, chunk, Scores(scale, softcap or 0.0), returns_lse)
    if q.is_cuda and importlib.util.find_spec("triton") is not None and flex.fits(q):
        return flex.attend_trees(q, k, v, trees, chunk=chunk, **options)
    return _attend_by_path(q, k, v, trees, chunk, **options)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer cannot contain numba's kernels
def _attend_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    trees: Trees,
    window: Window,
    chunk: int | None,
    scores: Scores,
    returns_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    heads = Heads(q.shape[1], k.shape[1], q.shape[3])
    spans = AttentionSpans.of_trees(trees, heads, window=window, chunk=chunk)
    return attend_spans(q, k, v, sinks, None, spans, scores, returns_lse=returns_lse)


def _attend_by_path(q: Tensor, k: Tensor, v: Tensor, trees: Trees, chunk: int | None, **options: Any) -> Any:
    """Computes every path as a document of its own."""
    paths = trees.paths.to(q.device)
    bounds = paths.cu_seqlens if chunk is None else cut_bounds(paths.cu_seqlens, chunk, trees.longest)
    q, k, v = (t.index_select(2, paths.index_M) for t in (q, k, v))
    if options["returns_lse"]:
        out, lse_MH = packed_attention(q, k, v, bounds, **options)
        return out.index_select(1, paths.place_N), lse_MH.index_select(0, paths.place_N)
    return packed_attention(q, k, v, bounds, **options).index_select(1, paths.place_N)


def cut_bounds(cu_seqlens: Tensor, chunk: int, longest: int) -> Tensor:
    """Returns the boundaries of the chunks of documents, int [C + 1].

    As many for each document, so that a GPU need not report lengths; those past its end are empty.

    Args:
        cu_seqlens: First token of each document and the end, [D + 1].
        chunk: Tokens of a chunk.
        longest: Tokens of the longest document.
    """
    starts_D1, stops_D1 = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    offsets = torch.arange(0, longest, chunk, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    cuts = torch.minimum(starts_D1 + offsets, stops_D1).flatten()
    return torch.cat((cuts, cu_seqlens[-1:]))
