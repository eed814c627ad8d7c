"""Cross-entropy straight from hidden states: the N x V logits never exist at once.

The head of a small model is a quarter of its arithmetic and its logits are most of its memory. Rows that carry
no loss are dropped before the product, the rest go through in chunks, and since the loss is a sum the gradient
of a chunk is known as soon as its logits are: it is computed in forward and backward only scales it.

Legend: N tokens, K kept tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ingle.kernels import IGNORE_INDEX
from ingle.kernels.numba.bfloat16 import FAST, bits, exp, largest, load, njit, prange, store, supported
from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.threads import match_threads

#: Logits of one chunk; 2^24 of them are 32 MiB in bfloat16, and a chunk of 500 rows still fills the cores.
CHUNK_LOGITS = 1 << 24
#: Rows of a chunk are a multiple of this: a product with a ragged last tile of rows is 6 to 20 % slower.
ROW_TILE = 64


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum of ``-log softmax(f(hidden W^T + bias))[target]`` over the targets that are not ``IGNORE_INDEX``.

    ``f(z) = softcap * tanh(logit_scale * z / softcap)``, or ``logit_scale * z`` without a softcap. Products run
    in the dtype of ``hidden``; the softmax, the loss and the gradients of weight and bias accumulate in float32.

    Args:
        hidden_NH: Hidden states, float, [N, H].
        weight_VH: Output embedding, [V, H]; another float type than ``hidden`` is cast for the product.
        targets_N: Token ids, int64, [N].
        bias: Of the logits, [V].
        logit_scale: Factor on the logits.
        softcap: Bound on the logits (Gemma 2, arXiv 2408.00118, section 2).
        chunk_size: Rows at once; a multiple of 64 with about 2^24 logits when null.

    Returns:
        A float32 scalar (float64 for float64 hidden states), differentiable once in hidden, weight and bias.

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section 3.2, for the gradient in forward.
    """
    assert logit_scale > 0, "a logit scale that is not positive turns the ranking around"
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias, targets_N, _Shape(logit_scale, softcap, chunk_size), torch.is_grad_enabled()
    )
    return loss


@torch.no_grad()
def linear_logps(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of every target, float32 [N], 0 where it is ``IGNORE_INDEX``; not differentiable.

    Arguments are those of :func:`linear_cross_entropy`, whose value is minus the sum of these.
    """
    kept_K = torch.nonzero(targets_N != IGNORE_INDEX).flatten()
    logps_N = torch.zeros(targets_N.shape, dtype=_accumulator(hidden_NH.dtype), device=hidden_NH.device)
    shape = _Shape(logit_scale, softcap, chunk_size)
    sums = _Gradients(None, None, None)
    logps_N[kept_K] = -_run(hidden_NH, weight_VH, bias, targets_N, kept_K, shape, sums)
    return logps_N


@dataclass(frozen=True)
class _Shape:
    """How logits are bent and cut."""

    logit_scale: float
    softcap: float | None
    chunk_size: int | None

    def rows(self, vocabulary: int) -> int:
        if self.chunk_size:
            return self.chunk_size
        return max(CHUNK_LOGITS // vocabulary // ROW_TILE * ROW_TILE, ROW_TILE)


@dataclass
class _Gradients:
    """Where gradients go; None for what needs none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def wanted(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias: Tensor | None,
        targets_N: Tensor,
        shape: _Shape,
        grad_enabled: bool,
    ) -> Tensor:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        accumulator = _accumulator(hidden_NH.dtype)
        kept_K = torch.nonzero(targets_N != IGNORE_INDEX).flatten()
        gradients = _Gradients(
            torch.zeros_like(hidden_NH) if needs[0] else None,
            torch.zeros_like(weight_VH, dtype=accumulator) if needs[1] else None,
            torch.zeros_like(bias, dtype=accumulator) if bias is not None and needs[2] else None,
        )
        nll_K = _run(hidden_NH, weight_VH, bias, targets_N, kept_K, shape, gradients)
        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return nll_K.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _run(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias: Tensor | None,
    targets_N: Tensor,
    kept_K: Tensor,
    shape: _Shape,
    gradients: _Gradients,
) -> Tensor:
    """Losses of the kept rows, [K]; adds to ``gradients`` what is wanted there."""
    dtype, vocabulary = hidden_NH.dtype, weight_VH.shape[0]
    weight_VH, nll = weight_VH.detach().to(dtype), []
    bias_V = None if bias is None else bias.detach().to(dtype)
    everything = len(kept_K) == len(targets_N)
    step = shape.rows(vocabulary)
    logits_buffer = torch.empty(min(step, len(kept_K)), vocabulary, dtype=dtype, device=hidden_NH.device)
    for start in range(0, len(kept_K), step):
        rows_C = slice(start, start + step) if everything else kept_K[start : start + step]
        hidden_CH = hidden_NH.detach()[rows_C]
        logits_CV = torch.mm(hidden_CH, weight_VH.t(), out=logits_buffer[: len(hidden_CH)])
        if bias_V is not None:
            logits_CV += bias_V
        nll.append(_bend_and_score(logits_CV, targets_N[rows_C], shape, gradients.wanted()))
        if gradients.hidden is not None and everything:
            torch.mm(logits_CV, weight_VH, out=gradients.hidden[rows_C])
        elif gradients.hidden is not None:
            gradients.hidden[rows_C] = logits_CV @ weight_VH
        if gradients.weight is not None:
            _accumulate(gradients.weight, logits_CV, hidden_CH)
        if gradients.bias is not None:
            gradients.bias += logits_CV.sum(0, dtype=gradients.bias.dtype)
    return torch.cat(nll) if nll else hidden_NH.new_zeros(0, dtype=_accumulator(dtype))


def _accumulate(weight_VH: Tensor, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
    """``weight += gradient^T hidden`` with a float32 sum over the chunks."""
    if weight_VH.dtype == gradient_CV.dtype:
        weight_VH.addmm_(gradient_CV.t(), hidden_CH)
    else:
        weight_VH += gradient_CV.t() @ hidden_CH


def _bend_and_score(logits_CV: Tensor, targets_C: Tensor, shape: _Shape, with_gradient: bool) -> Tensor:
    """Losses of a chunk, [C]; with a gradient, overwrites the raw logits with the loss's gradient in them."""
    if supported(logits_CV):
        match_threads(logits_CV.numel())
        nll_C = np.empty(len(targets_C), np.float32)
        score_rows(
            bits(logits_CV),
            targets_C.numpy(),
            np.float32(shape.logit_scale),
            np.float32(shape.softcap or 0.0),
            with_gradient,
            nll_C,
        )
        return torch.from_numpy(nll_C)
    return _score_with_torch(logits_CV, targets_C, shape, with_gradient)


def _score_with_torch(logits_CV: Tensor, targets_C: Tensor, shape: _Shape, with_gradient: bool) -> Tensor:
    """What :func:`score_rows` computes, readable and on any device."""
    z_CV = logits_CV.to(_accumulator(logits_CV.dtype)) * shape.logit_scale
    slope: float | Tensor = shape.logit_scale
    if shape.softcap:
        tanh_CV = torch.tanh(z_CV / shape.softcap)
        z_CV, slope = shape.softcap * tanh_CV, shape.logit_scale * (1 - tanh_CV**2)
    logps_CV = z_CV.log_softmax(-1)
    nll_C = -logps_CV.gather(1, targets_C[:, None])[:, 0]
    if with_gradient:
        gradient_CV = logps_CV.exp_()
        gradient_CV.scatter_add_(1, targets_C[:, None], -gradient_CV.new_ones(len(targets_C), 1))
        logits_CV.copy_(gradient_CV * slope)
    return nll_C


@njit(fastmath=FAST)
def _bend(raw, scale, softcap):  # type: ignore[no-untyped-def]
    z = raw * scale
    if softcap > np.float32(0.0):
        z = softcap * (np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * z / softcap) + np.float32(1.0)))
    return z


@njit(fastmath=FAST)
def _slope(z, scale, softcap):  # type: ignore[no-untyped-def]
    """Derivative of :func:`_bend` where it has the value z."""
    return scale * (np.float32(1.0) - (z / softcap) * (z / softcap)) if softcap > np.float32(0.0) else scale


@compile_float_kernel
def score_rows(logits, targets, scale, softcap, with_gradient, nll):  # type: ignore[no-untyped-def]
    """One row at a time, in cache: log-sum-exp, loss, then softmax minus one-hot in place of the logits."""
    num_rows, vocabulary = logits.shape
    for i in prange(num_rows):
        row = logits[i]
        shift = _bend(largest(row), scale, softcap)
        total = np.float32(0.0)
        for j in range(vocabulary):
            total += exp(_bend(load(row, j), scale, softcap) - shift)
        z_target = _bend(load(row, targets[i]), scale, softcap)
        nll[i] = np.log(total) + shift - z_target
        if with_gradient:
            inverse = np.float32(1.0) / total
            for j in range(vocabulary):
                z = _bend(load(row, j), scale, softcap)
                store(row, j, exp(z - shift) * inverse * _slope(z, scale, softcap))
            probability = exp(z_target - shift) * inverse
            store(row, targets[i], (probability - np.float32(1.0)) * _slope(z_target, scale, softcap))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
