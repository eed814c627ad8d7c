"""A fused decoder layer for single tokens over stored keys, prepared for many passes with the same weights.

With few tokens, everything around the products takes longer than they do. So weights are decoded once, the projections
of one input and their A matrices are one product, their B matrices another, and buffers are reused. What is rounded,
and when, is the same as in training.

Legend: M tokens of a pass, H hidden, I intermediate, O outputs and S ranks of the projections of one input, Hq query
heads, Hkv key/value heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from ingle.kernels.attention.cached import BLOCK, KeyStore
from ingle.kernels.attention.spans import Heads
from ingle.kernels.layers.decoder_layer import Attention, Mlp, Norm
from ingle.kernels.layers.elementwise import normalize_rows
from ingle.kernels.layers.lora import Projection
from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import FAST, bits, exp, load, store, supported
from ingle.kernels.threads import match_threads


class StoredLayer:
    """A decoder layer over stored keys.

    Args:
        attention: Weights and options of the first half.
        mlp: Weights of the second half.
        heads: Sizes of the heads.
        window: Number of tokens that a token sees, including itself; None for all.
        dtype: float32 or bfloat16.
    """

    def __init__(self, attention: Attention, mlp: Mlp, heads: Heads, window: int | None, dtype: torch.dtype) -> None:
        self._heads, self._scores = heads, attention.scores
        self._before = None if window is None else window - 1
        self._norms = [_Norm(norm, dtype) for norm in (attention.norm, mlp.norm, attention.q_norm, attention.k_norm)]
        self._qkv = _Product((attention.q, attention.k, attention.v), dtype)
        self._o, self._wide, self._down = (
            _Product(each, dtype) for each in ((attention.o,), (mlp.gate, mlp.up), (mlp.down,))
        )

    def __call__(self, h: Tensor, rotary: tuple[Tensor, Tensor], keys: KeyStore) -> Tensor:
        """Returns the hidden states after the layer, ``[1, M, H]``.

        Args:
            h: Hidden states, ``[1, M, H]``.
            rotary: cos and sin of each token's position, [M, Dh].
            keys: Keys and values.
        """
        heads, (first, second, q_norm, k_norm) = self._heads, self._norms
        h_MH = h[0]
        qkv_MO = self._qkv(first(h_MH))
        q_MHD = h.new_empty(len(h_MH), heads.q, heads.size)
        stored = keys.next_layer(q_MHD[:, : heads.kv], q_MHD[:, : heads.kv])
        match_threads(qkv_MO.numel())
        place_heads(
            bits(qkv_MO),
            keys.places.rows.numpy(),
            *map(bits, rotary),
            *q_norm.numbers,
            *k_norm.numbers,
            bits(q_MHD),
            *map(bits, stored),
        )
        out_MHD = keys.attend_placed(q_MHD, *stored, self._scores, before=self._before)
        h_MH = self._o(out_MHD.view(len(h_MH), -1)).add_(h_MH)
        wide_MI = self._wide(second(h_MH))
        inner_MI = wide_MI.new_empty(len(wide_MI), wide_MI.shape[1] // 2)
        match_threads(wide_MI.numel())
        swiglu_halves(bits(wide_MI), bits(inner_MI))
        return self._down(inner_MI).add_(h_MH)[None]


def can_prepare(projections: Sequence[Projection], like: Tensor) -> bool:
    """Returns whether projections can be prepared for hidden states like these."""
    plain = all(p.gain is None and p.inputs is None and p.group_size == 1 and not p.dropout for p in projections)
    return plain and supported(like)


class _Norm:
    """A frozen RMSNorm, or none."""

    def __init__(self, norm: Norm | None, dtype: torch.dtype) -> None:
        # Copied, because a sharded layer frees its weights after each pass.
        weight = torch.empty(0, dtype=dtype) if norm is None else norm.weight.clone()
        self.numbers: tuple[Any, Any] = bits(weight), np.float32(0.0 if norm is None else norm.eps)

    def __call__(self, h_MH: Tensor) -> Tensor:
        """Returns the normalized rows."""
        x_MH, rstd_M = torch.empty_like(h_MH), np.empty(len(h_MH), np.float32)
        match_threads(h_MH.numel())
        normalize_rows(bits(h_MH), *self.numbers, bits(x_MH), rstd_M)
        return x_MH


class _Product:
    """Projections of one input, side by side: ``x W^T + b + (x A^T) B^T``."""

    def __init__(self, projections: Sequence[Projection], dtype: torch.dtype) -> None:
        # Copied one after the other, because a weight is valid until the next request.
        weights = [p.weight(dtype).detach().clone() for p in projections]
        trained = [p if p.rank and not p.holds_change else None for p in projections]
        factors = [p.lora_a.detach().to(dtype) for p in trained if p is not None and p.lora_a is not None]
        self._width = sum(map(len, weights))
        self._weight_IO = torch.cat((*weights, *factors)).t()
        self._b_SO = torch.zeros(sum(map(len, factors)), self._width, dtype=dtype)
        row, column = 0, 0
        for p, weight in zip(trained, weights, strict=True):
            if p is not None:
                self._b_SO[row : row + p.rank, column : column + len(weight)] = p.scaled_b(dtype).detach().t()
                row += p.rank
            column += len(weight)
        biases = [p.bias for p in projections]
        self._bias_O: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [
                w.new_zeros(len(w)) if b is None else b.detach().to(dtype) for b, w in zip(biases, weights, strict=True)
            ]
            self._bias_O = torch.cat(parts)

    def __call__(self, x_MI: Tensor) -> Tensor:
        """Returns the outputs of all projections, ``[M, O]``, contiguous."""
        y = x_MI @ self._weight_IO
        base_MO = y[:, : self._width]
        if self._bias_O is not None:
            base_MO = base_MO + self._bias_O
        return torch.addmm(base_MO, y[:, self._width :], self._b_SO) if len(self._b_SO) else base_MO


@compile_float_kernel
def place_heads(qkv, rows, cos, sin, q_weight, q_eps, k_weight, k_eps, q, keys, values):  # type: ignore[no-untyped-def]
    """Normalizes and rotates the heads of each token; keys and values go to its row of the store."""
    num_tokens, num_heads, size = q.shape
    num_groups = keys.shape[1]
    for t in prange(num_tokens):
        normed = np.empty(size, qkv.dtype)
        for h in range(num_heads + num_groups):
            head = qkv[t, h * size : (h + 1) * size]
            if h < num_heads:
                _place_head(head, q_weight, q_eps, normed, cos[t], sin[t], q[t, h])
            else:
                key = keys[rows[t] // BLOCK, h - num_heads, :, rows[t] % BLOCK]
                _place_head(head, k_weight, k_eps, normed, cos[t], sin[t], key)
        for h in range(num_groups):
            at = (num_heads + num_groups + h) * size
            values[rows[t], h, :] = qkv[t, at : at + size]


@njit(fastmath=FAST, error_model="numpy")
def _place_head(head, weight, eps, normed, cos, sin, to):  # type: ignore[no-untyped-def]
    size = len(head)
    half = size // 2
    if len(weight) > 0:
        total = np.float32(0.0)
        for j in range(size):
            total += load(head, j) * load(head, j)
        scale = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
        for j in range(size):
            store(normed, j, load(head, j) * scale * load(weight, j))
    else:
        for j in range(size):
            normed[j] = head[j]
    for j in range(half):
        a, b = load(normed, j), load(normed, j + half)
        store(to, j, a * load(cos, j) - b * load(sin, j))
        store(to, j + half, b * load(cos, j + half) + a * load(sin, j + half))


@compile_float_kernel
def swiglu_halves(wide, inner):  # type: ignore[no-untyped-def]
    """Computes ``silu(gate) * up`` of rows that hold gate and up."""
    num_rows, width = inner.shape
    for i in prange(num_rows):
        gate, up, out = wide[i, :width], wide[i, width:], inner[i]
        for j in range(width):
            value = load(gate, j)
            store(out, j, value / (np.float32(1.0) + exp(-value)) * load(up, j))
