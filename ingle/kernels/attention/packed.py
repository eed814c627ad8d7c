"""Attention within packed documents: exact, and no token sees another document.

Legend: N packed tokens, M packed keys (N but in cross-attention), D documents, T tokens and S keys of one document, Hq
query heads, Hkv key/value heads, Dh head size.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ingle.kernels.attention import flex
from ingle.kernels.attention.cpu import Scores, attend, attend_backward
from ingle.kernels.attention.layout import group_gradient, group_rows, ungroup_rows
from ingle.kernels.attention.spans import AttentionSpans, Heads, Window, reach
from ingle.kernels.numba.scalars import supported


@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, returns_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, returns_lse: Literal[False] = False, **options: Any
) -> Tensor: ...


def packed_attention(  # type: ignore[misc]  # the overloads leave out the options that they have in common
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    longest: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    longest_k: int | None = None,
    returns_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes ``softmax(f(scale * q k^T) + bias) v`` within each document.

    ``f(s) = softcap * tanh(s / softcap)``, or nothing without a softcap. A CPU has its own kernels. A CUDA device runs
    FlashAttention; FlexAttention for softcaps, sinks, biases and float32; and else attention document by document.

    Args:
        q: [1, Hq, N, Dh]; any strides.
        k: [1, Hkv, M, Dh]; query head h reads key/value head ``h // (Hq / Hkv)``.
        v: [1, Hkv, M, Dv]; Dv is another size than Dh in multi-head latent attention.
        cu_seqlens: Index of the first token of each document, and N; int, [D + 1].
        scale: Factor on the scores.
        causal: Whether a token sees only itself and earlier tokens.
        window: Number of tokens that a token sees, including itself (on either side if not causal), or how many before
            itself and after itself; None for all.
        softcap: Bound on the scores (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [Hq]; score of one more key that every token sees and that has no value (gpt-oss). Trainable.
        bias: [Hq, 2L - 1]; added to the scores by distance, in column ``key - query + L - 1``; L is at least the length
            of the longest document (T5, arXiv 1910.10683, section 2.1). Trainable. Without softcap and other bounds.
        longest: Length of the longest document, if the caller knows it; FlashAttention otherwise waits for the device.
        cu_seqlens_k: Bounds of the documents among the keys in cross-attention, int, [D + 1]; every query sees all
            keys of its document, whatever ``causal`` and ``window`` are.
        longest_k: Like ``longest``, of the keys.
        returns_lse: Return the log-sum-exp of the scores, too, for :func:`ingle.kernels.attention.prefix.add_keys`.

    Returns:
        [1, N, Hq, Dv]; and if asked, the log-sum-exp with its gradient, at least float32 [N, Hq].
    """
    assert bias is None or (softcap is None and cu_seqlens_k is None), "a bias goes with neither"
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "sinks": sinks}
    options |= {"bias": bias, "cu_seqlens_k": cu_seqlens_k}
    if v.shape[3] != q.shape[3]:  # zeros change neither scores nor the other columns of the result
        sizes = (q.shape[3], v.shape[3])
        q, k, v = (pad(t, (0, max(sizes) - t.shape[3])) for t in (q, k, v))
        options |= {"longest": longest, "longest_k": longest_k}
        if returns_lse:
            wide, lse_NH = packed_attention(q, k, v, cu_seqlens, **options, returns_lse=True)
            return wide[..., : sizes[1]], lse_NH
        padded: Tensor = packed_attention(q, k, v, cu_seqlens, **options)
        return padded[..., : sizes[1]]
    options["returns_lse"] = returns_lse
    if supported(q, k, v):
        result: Tensor | tuple[Tensor, Tensor] = _attend_on_cpu(q, k, v, cu_seqlens, **options)
        return result
    # FlashAttention has no gradient of its log-sum-exp.
    plain = softcap is None and sinks is None and bias is None and not returns_lse
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and plain and _has_varlen():
        whole = (None, None) if cu_seqlens_k is not None else reach(causal, window)
        queries = _Bounds.of(cu_seqlens, longest)
        keys = queries if cu_seqlens_k is None else _Bounds.of(cu_seqlens_k, longest_k)
        return _attend_varlen(q, k, v, queries, keys, scale, whole)
    if q.is_cuda and importlib.util.find_spec("triton") is not None and flex.fits(q):
        return flex.attend_flex(q, k, v, cu_seqlens, **options)
    return attend_by_document(q, k, v, cu_seqlens, **options)


def _has_varlen() -> bool:
    """Returns whether this torch has variable-length attention with windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


class _Bounds(NamedTuple):
    """Bounds of documents as FlashAttention takes them: int32 [D + 1], and the length of the longest."""

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, longest: int | None) -> _Bounds:
        bounds = cu_seqlens.to(torch.int32)
        return cls(bounds, longest or int((bounds[1:] - bounds[:-1]).max()))


def _attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: _Bounds,
    keys: _Bounds,
    scale: float,
    seen: tuple[int | None, int | None],
) -> Tensor:
    """Runs torch's FlashAttention over packed documents. Its speed has not been measured."""
    from torch.nn.attention.varlen import varlen_attn

    q_NHD, k_NHD, v_NHD = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    before, after = (-1 if count is None else count for count in seen)
    out: Any = varlen_attn(
        q_NHD,
        k_NHD,
        v_NHD,
        queries.bounds,
        keys.bounds,
        queries.longest,
        keys.longest,
        scale=scale,
        window_size=(before, after),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    result: Tensor = out[None]
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer cannot contain numba's kernels
def _attend_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    causal: bool,
    window: Window,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_k: Tensor | None,
    returns_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    heads = Heads(q.shape[1], k.shape[1], q.shape[3])
    spans = AttentionSpans.of(cu_seqlens, heads, causal=causal, window=window, cu_seqlens_k=cu_seqlens_k)
    scores = Scores(scale, softcap or 0.0, None if bias is None else bias.detach().float().contiguous())
    return attend_spans(q, k, v, sinks, bias, spans, scores, returns_lse=returns_lse)


def attend_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    spans: AttentionSpans,
    scores: Scores,
    *,
    returns_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes :func:`packed_attention` on a CPU over the keys that ``spans`` names."""
    out, lse_NH = _PackedAttention.apply(q, k, v, sinks, bias, spans, scores, returns_lse)  # type: ignore[no-untyped-call]
    return (out, lse_NH) if returns_lse else out


class _PackedAttention(torch.autograd.Function):
    """Attention of :mod:`ingle.kernels.attention.cpu` for the shapes that transformers uses."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bias: Tensor | None,
        spans: AttentionSpans,
        scores: Scores,
        returns_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        heads = spans.heads
        q_grouped = group_rows(_dense(q[0]).transpose(0, 1), spans.by_tile, heads)
        k_grouped, v_grouped = (group_rows(_dense(t[0]).transpose(0, 1), spans.by_segment, heads) for t in (k, v))
        out, lse = attend(q_grouped, k_grouped, v_grouped, spans, scores)
        sink_rows = None
        if sinks is not None:  # the softmax is over one more score, so every weight shrinks by the same factor
            rows_NH1 = sinks.detach().float().expand(q.shape[2], -1).contiguous()[..., None]
            sink_rows = group_rows(rows_NH1, spans.by_tile, Heads(heads.q, heads.kv, 1))
            whole = torch.logaddexp(lse, sink_rows)
            out.view(-1, heads.size).mul_((lse - whole).exp_()[:, None])
            lse = whole
        out_NHD = ungroup_rows(out, q.new_empty(q.shape[2], heads.q, heads.size), spans.by_tile, heads)
        ctx.spans, ctx.scores, ctx.bias_dtype = spans, scores, None if bias is None else bias.dtype
        ctx.save_for_backward(q_grouped, k_grouped, v_grouped, lse, out_NHD, sinks, sink_rows)
        if not returns_lse:
            return out_NHD[None], None
        return out_NHD[None], _ungroup_numbers(lse, len(out_NHD), spans)[..., 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_1NHD: Tensor, grad_lse_NH: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, lse, out_NHD, sinks, sink_rows = ctx.saved_tensors
        spans: AttentionSpans = ctx.spans
        heads = spans.heads
        grad, delta = group_gradient(_dense(grad_1NHD[0]), out_NHD, spans)
        if grad_lse_NH is not None:  # the gradient of a score is its weight times (slope - delta + gradient of the lse)
            delta -= group_rows(grad_lse_NH.contiguous()[..., None], spans.by_tile, Heads(heads.q, heads.kv, 1))
        grad_bias = torch.zeros_like(ctx.scores.bias) if ctx.needs_input_grad[4] else None
        grads = attend_backward(grad, delta, lse, q, k, v, spans, ctx.scores, grad_bias)
        layouts = ((heads.q, spans.by_tile), (heads.kv, spans.by_segment), (heads.kv, spans.by_segment))
        grads_NHD = (
            ungroup_rows(grouped, out_NHD.new_empty(grouped.numel()).view(-1, count, heads.size), by, heads)
            for grouped, (count, by) in zip(grads, layouts, strict=True)
        )
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            rows = (sink_rows - lse).exp_().mul_(delta).neg_()
            grad_sinks = _ungroup_numbers(rows, len(out_NHD), spans).sum((0, 2)).to(sinks.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return (*(grad_NHD.transpose(0, 1)[None] for grad_NHD in grads_NHD), grad_sinks, grad_bias, None, None, None)


def _ungroup_numbers(rows: Tensor, num_tokens: int, spans: AttentionSpans) -> Tensor:
    """Returns one number per query and head as [N, Hq, 1]."""
    heads = spans.heads
    sizes = Heads(heads.q, heads.kv, 1)
    return ungroup_rows(rows, rows.new_empty(num_tokens, heads.q, 1), spans.by_tile, sizes)


def _dense(tensor: Tensor) -> Tensor:
    """Returns a tensor whose last dimension is contiguous, as the kernels require."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def attend_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    causal: bool,
    window: Window,
    softcap: float | None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    returns_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Reference of :func:`packed_attention` on any device; batches documents of equal length."""
    bounds, bounds_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    by_lengths: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (start, stop), (start_k, stop_k) in zip(itertools.pairwise(bounds), itertools.pairwise(bounds_k), strict=True):
        if stop > start:
            by_lengths.setdefault((stop - start, stop_k - start_k), []).append((start, start_k))
    seen = reach(causal, window) if cu_seqlens_k is None else (None, None)
    orders, outputs, sums = [], [], []
    for lengths, starts in by_lengths.items():
        index, index_k = (
            (torch.tensor(column, device=q.device)[:, None] + torch.arange(length, device=q.device)).flatten()
            for column, length in zip(zip(*starts, strict=True), lengths, strict=True)
        )
        whole = len(by_lengths) == 1 and len(index_k) == k.shape[2]  # one length: no copy is needed
        q_DHTD, k_DHTD, v_DHTD = (
            (t[0] if whole else t[0, :, each]).unflatten(1, (len(starts), -1)).transpose(0, 1)
            for t, each in ((q, index), (k, index_k), (v, index_k))
        )
        if returns_lse:
            out_DHTD, lse_DHT = _attend_scores(q_DHTD, k_DHTD, v_DHTD, seen, scale, softcap, sinks, bias)
            sums.append(lse_DHT.transpose(1, 2).flatten(0, 1))
        else:
            out_DHTD = _attend(q_DHTD, k_DHTD, v_DHTD, seen, scale, softcap, sinks, bias)
        outputs.append(out_DHTD.transpose(1, 2).flatten(0, 1))
        orders.append(index)
    if len(outputs) == 1:
        return (outputs[0][None], sums[0]) if returns_lse else outputs[0][None]
    back = torch.empty(q.shape[2], dtype=torch.long, device=q.device)
    back[torch.cat(orders)] = torch.arange(q.shape[2], device=q.device)
    out = torch.cat(outputs)[back][None]
    return (out, torch.cat(sums)[back]) if returns_lse else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[int | None, int | None],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Returns [D, Hq, T, Dh] over a batch of documents of one length.

    Args:
        q: [D, Hq, T, Dh].
        k: [D, Hkv, S, Dh].
        v: [D, Hkv, S, Dv].
        seen: How many tokens before and after itself a token sees; None for all.
        scale: This and the following arguments are those of :func:`packed_attention`.
        softcap: Bound on the scores.
        sinks: Scores of one more key.
        bias: Added to the scores by distance.
    """
    before, after = (None if count is None or count >= max(1, k.shape[2] - 1) else count for count in seen)
    causal = before is None and after == 0
    if softcap is None and sinks is None and bias is None and causal:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if softcap is None and sinks is None and bias is None and before is None and after is None:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if softcap is None and sinks is None and bias is None:
        visible = _visible(q, k, seen)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _attend_scores(q, k, v, seen, scale, softcap, sinks, bias)[0]


def _distances(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None]


def _visible(q: Tensor, k: Tensor, seen: tuple[int | None, int | None]) -> Tensor | None:
    """Returns which keys each query sees, [T, S]; None for all."""
    before, after = seen
    if before is None and after is None:
        return None
    distance_TS = _distances(q, k)
    return (distance_TS >= -(k.shape[2] if before is None else before)) & (
        distance_TS <= (k.shape[2] if after is None else after)
    )


def _attend_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: tuple[int | None, int | None],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes :func:`_attend` from all scores; returns their log-sum-exp [D, Hq, T], too."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    accumulator = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(accumulator)
    scores = scores * scale if softcap is None else torch.tanh(scores * (scale / softcap)) * softcap
    if bias is not None:
        scores = scores + bias[:, _distances(q, k) + bias.shape[1] // 2]
    visible = _visible(q, k, seen)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(accumulator)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    return scores.softmax(-1)[..., : k.shape[-2]].to(q.dtype) @ v, scores.logsumexp(-1)
