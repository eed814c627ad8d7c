"""Cross-entropy directly from hidden states, with its gradient computed in forward.

A sum of losses has one upstream gradient, so the gradient of a chunk is known as soon as its logits are: forward
computes it and backward only scales it, which saves a third of the products of :mod:`ingle.kernels.layers.token_logps`.

Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ingle.kernels.layers.logits import LogitTransform, accumulator, score, score_with_gradient_
from ingle.kernels.layers.token_logps import ChunkedHead


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
    """Returns the sum of ``-log softmax(f(hidden W^T + bias))[target]`` over the targets that are not ``IGNORE_INDEX``.

    Arguments, ``f`` and dtypes are those of :func:`~ingle.kernels.layers.token_logps.token_logps`, whose sum is minus
    this loss.

    Returns:
        A float32 scalar (float64 for float64 hidden states), differentiable once in hidden, weight and bias.

    Source: Hsu et al. 2024, "Liger Kernel" (arXiv 2410.10989), section 3.2, for the gradient in forward.
    """
    transform = LogitTransform(logit_scale, softcap)
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias, targets_N, transform, chunk_size, torch.is_grad_enabled()
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias: Tensor | None,
        targets_N: Tensor,
        transform: LogitTransform,
        chunk_size: int | None,
        grad_enabled: bool,
    ) -> Tensor:
        head = ChunkedHead(hidden_NH, weight_VH, bias, targets_N, chunk_size)
        needed = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        head.make_gradients(needed)
        logps = [hidden_NH.new_zeros(0, dtype=accumulator(hidden_NH.dtype))]
        for rows_C, logits_CV in head.chunks():
            logps.append((score_with_gradient_ if any(needed) else score)(logits_CV, targets_N[rows_C], transform))
            head.add_gradients(rows_C, logits_CV)
        ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(*head.gradients)
        return torch.cat(logps).neg().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)
