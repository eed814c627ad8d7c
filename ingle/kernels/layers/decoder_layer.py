"""The two halves of a Llama-like decoder layer, each one autograd function with a hand-written backward.

``h + o(attention(rotate(q(norm h)), rotate(k(norm h)), v(norm h)))`` and ``h + down(silu(gate(norm h)) * up(norm h))``.

Compared with separate operators, normalized rows, rotated copies, the activation and the gradients of its inputs are
neither saved nor copied; the projections of one input share one product for their A matrices; the residual is added in
place; and backward overwrites saved buffers with its results. On a CUDA device, where attention is torch's own, the
first half is three functions: projected and rotated heads, attention, and the output's projection.

Legend: N tokens, H hidden, I intermediate, Hq query heads, Hkv key/value heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ingle.kernels.attention.cached import KeyStore
from ingle.kernels.attention.cpu import Scores, attend, attend_backward
from ingle.kernels.attention.layout import group_gradient, group_rows, ungroup_rows
from ingle.kernels.attention.packed import packed_attention
from ingle.kernels.attention.spans import AttentionSpans, Heads
from ingle.kernels.attention.tree_attention import tree_attention
from ingle.kernels.attention.trees import Trees
from ingle.kernels.layers.elementwise import (
    recompute_rms_norm,
    rms_norm,
    rms_norm_backward_,
    rotate,
    swiglu,
    swiglu_backward_,
)
from ingle.kernels.layers.lora import (
    Projection,
    interleave,
    lora_linears,
    project,
    seeded,
    through_a,
    through_b,
    through_gains,
    through_weights,
    with_gain,
)


@dataclass(frozen=True)
class Norm:
    """A frozen RMSNorm.

    Attributes:
        weight: [H], or [Dh] for a norm of heads.
        eps: Added to the mean square.
    """

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Attention:
    """The attention half.

    Attributes:
        norm: Norm before the projections.
        q: Projection of the queries; likewise ``k``, ``v`` and ``o``.
        scores: Scaling and softcap of the scores.
        q_norm: Norm of each query head before its rotation (Qwen 3).
        k_norm: Norm of each key head.
    """

    norm: Norm
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    scores: Scores
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Mlp:
    """The SwiGLU half."""

    norm: Norm
    gate: Projection
    up: Projection
    down: Projection


@dataclass(frozen=True)
class Boundaries:
    """Which keys each token sees, for attention that is not computed by :mod:`ingle.kernels.attention.cpu`.

    Attributes:
        heads: Sizes of the heads.
        documents: Index of the first token of each document, and N; int, [D + 1]. Or which documents continue others.
        window: Number of tokens that a token sees, including itself; None for all of its document.
        longest: Length of the longest document, if it is known.
    """

    heads: Heads
    documents: Tensor | Trees
    window: int | None
    longest: int | None


def attention_half(
    h: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor], spans: AttentionSpans | Boundaries
) -> Tensor:
    """Returns ``h + o(attention(norm h))``, [1, N, H] -> [1, N, H].

    Args:
        h: The residual stream.
        attention: Weights and options.
        rotary: cos and sin of each token's position, [N, Dh].
        spans: Which keys each token sees, and the sizes of the heads.
    """
    if isinstance(spans, Boundaries):
        return _attend_in_parts(h, attention, rotary, spans)
    qkv = seeded((attention.q, attention.k, attention.v))
    out = seeded((attention.o,))
    operands = [operand for p in (*qkv, *out) for operand in p.operands()]
    result: Tensor = _AttentionHalf.apply(h, attention, qkv, out, rotary, spans, *operands)  # type: ignore[no-untyped-call]
    return result


def attend_stored(
    h: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor], heads: Heads, store: KeyStore, window: int | None
) -> Tensor:
    """Returns :func:`attention_half` of single tokens over the keys of a store, without gradients.

    Args:
        h: The residual stream, [1, N, H].
        attention: Weights and options.
        rotary: cos and sin of each token's position, [N, Dh].
        heads: Sizes of the heads.
        store: Keys and values.
        window: Number of tokens that a token sees, including itself; None for all.
    """
    h_NH = h.reshape(-1, h.shape[-1])
    x_NH, _ = rms_norm(h_NH, attention.norm.weight, attention.norm.eps)
    q_ND, k_ND, v_ND = project(x_NH, (attention.q, attention.k, attention.v)).outputs
    q_ND, k_ND = (
        _norm_heads(part, norm, heads.size)[0] for part, norm in ((q_ND, attention.q_norm), (k_ND, attention.k_norm))
    )
    before = None if window is None else window - 1
    q_NHD, k_NHD = (_rotated(_heads(part, heads), heads, rotary) for part in (q_ND, k_ND))
    out_NHD = store.attend(q_NHD, k_NHD, _heads(v_ND, heads), attention.scores, before=before)
    (y,) = project(out_NHD.view(*h.shape[:-1], -1), (attention.o,)).outputs
    return y.add_(h)


def _rotated(source_NHD: Tensor, heads: Heads, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates heads as the attention of training does, [N, H, Dh]; each token is a tile of its own."""
    if source_NHD.is_cuda:
        return rotate(source_NHD, *rotary)
    each = np.arange(len(source_NHD), dtype=np.int32)
    return group_rows(source_NHD, np.stack((each, each + 1), 1), heads, rotary).view(source_NHD.shape)


def mlp_half(h: Tensor, mlp: Mlp) -> Tensor:
    """Returns ``h + down(silu(gate(norm h)) * up(norm h))``, [1, N, H] -> [1, N, H]."""
    wide, down = seeded((mlp.gate, mlp.up)), seeded((mlp.down,))
    operands = [operand for p in (*wide, *down) for operand in p.operands()]
    result: Tensor = _MlpHalf.apply(h, mlp, wide, down, *operands)  # type: ignore[no-untyped-call]
    return result


def _attend_in_parts(h: Tensor, attention: Attention, rotary: tuple[Tensor, Tensor], boundaries: Boundaries) -> Tensor:
    qkv = seeded((attention.q, attention.k, attention.v))
    operands = [operand for p in qkv for operand in p.operands()]
    heads = boundaries.heads
    rotated: Any = _RotatedHeads.apply(h, attention, qkv, rotary, heads, *operands)  # type: ignore[no-untyped-call]
    q, k, v = (part_NHD.transpose(0, 1)[None] for part_NHD in rotated)
    scores = attention.scores
    options: dict[str, Any] = {"scale": scores.scale, "window": boundaries.window, "softcap": scores.softcap or None}
    if isinstance(boundaries.documents, Trees):
        out = tree_attention(q, k, v, boundaries.documents, **options)
    else:
        out = packed_attention(q, k, v, boundaries.documents, **options, longest=boundaries.longest)
    return h + lora_linears(out.flatten(2), (attention.o,))[0]


class _RotatedHeads(torch.autograd.Function):
    """``rotate(q(norm h)), rotate(k(norm h)), v(norm h)``, each [N, heads, Dh]."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        attention: Attention,
        qkv: Sequence[Projection],
        rotary: tuple[Tensor, Tensor],
        heads: Heads,
        *operands: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h_NH = h.reshape(-1, h.shape[-1])
        x_NH, rstd_N = rms_norm(h_NH, attention.norm.weight, attention.norm.eps)
        (q_ND, k_ND, v_ND), xa_NS, raw = project(x_NH, qkv)
        q_normed, q_kept = _norm_heads(q_ND, attention.q_norm, heads.size)
        k_normed, k_kept = _norm_heads(k_ND, attention.k_norm, heads.size)
        ctx.attention, ctx.qkv, ctx.rotary, ctx.shape = attention, qkv, rotary, h.shape
        ctx.save_for_backward(h_NH, rstd_N, xa_NS, *q_kept, *k_kept, *raw)
        q_NHD, k_NHD = (rotate(_heads(normed, heads), *rotary) for normed in (q_normed, k_normed))
        return q_NHD, k_NHD, _heads(v_ND, heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads_NHD: Tensor) -> tuple[Any, ...]:
        h_NH, rstd_N, xa_NS, q_raw, q_rstd, k_raw, k_rstd, *raw = ctx.saved_tensors
        attention, qkv = ctx.attention, ctx.qkv
        q_NHD, k_NHD = (rotate(grad_NHD, *ctx.rotary, back=True) for grad_NHD in grads_NHD[:2])
        _norm_heads_backward_(q_NHD, q_raw, q_rstd, attention.q_norm)
        _norm_heads_backward_(k_NHD, k_raw, k_rstd, attention.k_norm)
        grads_ND = [q_NHD.flatten(1), k_NHD.flatten(1), grads_NHD[2].flatten(1)]
        grads_ND, grads_gain = through_gains(grads_ND, raw, qkv)
        gb_NS, grads_b = through_b(grads_ND, xa_NS, qkv)
        grads_a = through_a(gb_NS, recompute_rms_norm(h_NH, attention.norm.weight, rstd_N), qkv)
        grad_h = None
        if ctx.needs_input_grad[0]:
            grad_x_NH = through_weights(grads_ND, gb_NS, qkv)
            grad_h = rms_norm_backward_(grad_x_NH, h_NH, attention.norm.weight, rstd_N).view(ctx.shape)
        return (grad_h, None, None, None, None, *interleave(grads_a, grads_b, grads_gain))


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        attention: Attention,
        qkv: Sequence[Projection],
        out: Sequence[Projection],
        rotary: tuple[Tensor, Tensor],
        spans: AttentionSpans,
        *operands: Tensor | None,
    ) -> Tensor:
        heads, norm = spans.heads, attention.norm
        h_NH = h.reshape(-1, h.shape[-1])
        x_NH, rstd_N = rms_norm(h_NH, norm.weight, norm.eps)
        (q_ND, k_ND, v_ND), xa_NS, raw = project(x_NH, qkv)
        del x_NH
        heads_normed, q_kept = _norm_heads(q_ND, attention.q_norm, heads.size)
        keys_normed, k_kept = _norm_heads(k_ND, attention.k_norm, heads.size)
        q = group_rows(_heads(heads_normed, heads), spans.by_tile, heads, rotary)
        k = group_rows(_heads(keys_normed, heads), spans.by_segment, heads, rotary)
        v = group_rows(_heads(v_ND, heads), spans.by_segment, heads)
        del q_ND, k_ND, v_ND, heads_normed, keys_normed
        out_grouped, lse = attend(q, k, v, spans, attention.scores)
        o_NHD = ungroup_rows(out_grouped, h.new_empty(len(h_NH), heads.q, heads.size), spans.by_tile, heads)
        # In the shape of the result, which then is no view: FSDP attaches a hook to it.
        (y,), oa_NR, out_raw = project(o_NHD.view(*h.shape[:-1], -1), out)
        ctx.attention, ctx.qkv, ctx.out, ctx.rotary, ctx.spans = attention, qkv, out, rotary, spans
        ctx.save_for_backward(h_NH, rstd_N, xa_NS, q, k, v, lse, o_NHD, oa_NR, *q_kept, *k_kept, *raw, *out_raw)
        return y.add_(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        h_NH, rstd_N, xa_NS, q, k, v, lse, o_NHD, oa_NR, q_raw, q_rstd, k_raw, k_rstd, *raw = ctx.saved_tensors
        attention, spans, heads = ctx.attention, ctx.spans, ctx.spans.heads
        grad_NH = grad.reshape(h_NH.shape)
        grads_out, grads_gain = through_gains([grad_NH], raw[3:], ctx.out)
        gb_NR, grads_b = through_b(grads_out, oa_NR, ctx.out)
        grads_a = through_a(gb_NR, o_NHD.flatten(1), ctx.out)
        grad_o_NHD = through_weights(grads_out, gb_NR, ctx.out).view(o_NHD.shape)
        grad_grouped, delta = group_gradient(grad_o_NHD, o_NHD, spans)
        grad_q, grad_k, grad_v = attend_backward(grad_grouped, delta, lse, q, k, v, spans, attention.scores)
        q_NHD, k_NHD, v_NHD = (h_NH.new_empty(len(h_NH), n, heads.size) for n in (heads.q, heads.kv, heads.kv))
        ungroup_rows(grad_q, q_NHD, spans.by_tile, heads, ctx.rotary)
        ungroup_rows(grad_k, k_NHD, spans.by_segment, heads, ctx.rotary)
        ungroup_rows(grad_v, v_NHD, spans.by_segment, heads)
        _norm_heads_backward_(q_NHD, q_raw, q_rstd, attention.q_norm)
        _norm_heads_backward_(k_NHD, k_raw, k_rstd, attention.k_norm)
        grads_ND = [q_NHD.flatten(1), k_NHD.flatten(1), v_NHD.flatten(1)]
        grads_ND, grads_gain_qkv = through_gains(grads_ND, raw[:3], ctx.qkv)
        x_NH = recompute_rms_norm(h_NH, attention.norm.weight, rstd_N)
        gb_NS, grads_b_qkv = through_b(grads_ND, xa_NS, ctx.qkv)
        grads_a_qkv = through_a(gb_NS, x_NH, ctx.qkv)
        grad_h = None
        if ctx.needs_input_grad[0]:
            grad_x_NH = through_weights(grads_ND, gb_NS, ctx.qkv)
            grad_h = rms_norm_backward_(grad_x_NH, h_NH, attention.norm.weight, rstd_N, grad_NH).view(grad.shape)
        of_qkv, of_out = (grads_a_qkv, grads_b_qkv, grads_gain_qkv), (grads_a, grads_b, grads_gain)
        return (grad_h, None, None, None, None, None, *interleave(*of_qkv), *interleave(*of_out))


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, mlp: Mlp, wide: Sequence[Projection], down: Sequence[Projection], *operands: Tensor | None
    ) -> Tensor:
        h_NH = h.reshape(-1, h.shape[-1])
        x_NH, rstd_N = rms_norm(h_NH, mlp.norm.weight, mlp.norm.eps)
        (gate_NI, up_NI), xa_NS, raw = project(x_NH, wide)
        del x_NH
        inner = swiglu(gate_NI, up_NI).view(*h.shape[:-1], -1)  # so that the result is no view
        (y,), ia_NR, down_raw = project(inner, down)
        ctx.mlp, ctx.wide, ctx.down, ctx.spent = mlp, wide, down, False
        kept = [value if before is None else None for value, before in zip((gate_NI, up_NI), raw, strict=True)]
        ctx.save_for_backward(h_NH, rstd_N, xa_NS, ia_NR, *kept, *raw, *down_raw)
        return y.add_(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.spent:
            raise RuntimeError("The backward pass of a fused layer overwrites its buffers and can run only once.")
        ctx.spent = True
        h_NH, rstd_N, xa_NS, ia_NR, *saved = ctx.saved_tensors
        kept, raw, down_raw = saved[:2], saved[2:4], saved[4:]
        gate_NI, up_NI = (
            with_gain(before, p) if value is None else value
            for value, before, p in zip(kept, raw, ctx.wide, strict=True)
        )
        grad_NH = grad.reshape(h_NH.shape)
        grads_down, grads_gain = through_gains([grad_NH], down_raw, ctx.down)
        gb_NR, grads_b = through_b(grads_down, ia_NR, ctx.down)
        inner_NI = through_weights(grads_down, gb_NR, ctx.down)
        swiglu_backward_(inner_NI, gate_NI, up_NI)  # now they hold the activation and the gradients of gate and up
        grads_a = through_a(gb_NR, inner_NI, ctx.down)
        del inner_NI
        grads_wide, grads_gain_wide = through_gains([gate_NI, up_NI], raw, ctx.wide)
        gb_NS, grads_b_wide = through_b(grads_wide, xa_NS, ctx.wide)
        x_NH = recompute_rms_norm(h_NH, ctx.mlp.norm.weight, rstd_N)
        grads_a_wide = through_a(gb_NS, x_NH, ctx.wide)
        del x_NH
        grad_h = None
        if ctx.needs_input_grad[0]:
            grad_x_NH = through_weights(grads_wide, gb_NS, ctx.wide)
            grad_h = rms_norm_backward_(grad_x_NH, h_NH, ctx.mlp.norm.weight, rstd_N, grad_NH).view(grad.shape)
        of_wide, of_down = (grads_a_wide, grads_b_wide, grads_gain_wide), (grads_a, grads_b, grads_gain)
        return (grad_h, None, None, None, *interleave(*of_wide), *interleave(*of_down))


def _heads(values_ND: Tensor, heads: Heads) -> Tensor:
    return values_ND.view(len(values_ND), -1, heads.size)


def _norm_heads(
    values_ND: Tensor, norm: Norm | None, size: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | tuple[None, None]]:
    """Returns the values with each head normalized, and the tensors that backward needs."""
    if norm is None:
        return values_ND, (None, None)
    rows = values_ND.view(-1, size)
    normed, rstd = rms_norm(rows, norm.weight, norm.eps)
    return normed.view(values_ND.shape), (rows, rstd)


def _norm_heads_backward_(grad_NHD: Tensor, rows: Tensor | None, rstd: Tensor | None, norm: Norm | None) -> None:
    if norm is not None and rows is not None and rstd is not None:
        rms_norm_backward_(grad_NHD.view(rows.shape), rows, norm.weight, rstd)
