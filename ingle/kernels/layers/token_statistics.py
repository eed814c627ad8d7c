"""Log-probabilities of tokens, and what the distributions that they come from look like, in one pass.

Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ingle.kernels.layers.logits import LogitTransform, accumulator, describe, differentiate_both
from ingle.kernels.layers.token_logps import ChunkedHead, TokenLogps


class TokenStatistics(NamedTuple):
    """Figures of each token, float32 [N] (float64 for float64 hidden states); 0 where there is no target.

    Attributes:
        logps: Log-probability of the target, in nats; differentiable.
        entropies: Entropy of the distribution, in nats; differentiable only if that was asked for.
        log_squares: Logarithm of the sum of the squared probabilities; detached.
    """

    logps: Tensor
    entropies: Tensor
    log_squares: Tensor


def token_statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    with_entropies: bool = False,
) -> TokenStatistics:
    """Returns :func:`~ingle.kernels.layers.token_logps.token_logps`, entropies and sums of squares; same arguments.

    With ``with_entropies``, gradients flow through the entropies, too.
    """
    transform = LogitTransform(logit_scale, softcap)
    found = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias, targets_N, transform, chunk_size, with_entropies
    )
    return TokenStatistics(*found)


class _TokenStatistics(TokenLogps):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias: Tensor | None,
        targets_N: Tensor,
        transform: LogitTransform,
        chunk_size: int | None,
        with_entropies: bool,
    ) -> tuple[Tensor, ...]:
        head = ChunkedHead(hidden_NH, weight_VH, bias, targets_N, chunk_size)
        dtype, device = accumulator(hidden_NH.dtype), hidden_NH.device
        found = tuple(torch.zeros(targets_N.shape, dtype=dtype, device=device) for _ in range(3))
        for rows_C, logits_CV in head.chunks():
            for values_N, values_C in zip(found, describe(logits_CV, targets_N[rows_C], transform), strict=True):
                values_N[rows_C] = values_C
        ctx.transform, ctx.chunk_size, ctx.with_entropies = transform, chunk_size, with_entropies
        ctx.save_for_backward(hidden_NH, weight_VH, bias, targets_N, found[0])
        ctx.mark_non_differentiable(*found[2 if with_entropies else 1 :])
        return found

    @staticmethod
    def backward(ctx: Any, grads_N: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.with_entropies:
            return (*TokenLogps.backward(ctx, grads_N), None)
        hidden_NH, weight_VH, bias, targets_N, _ = ctx.saved_tensors
        inputs = hidden_NH, weight_VH, bias
        head = ChunkedHead(*inputs, targets_N, ctx.chunk_size)
        head.make_gradients(ctx.needs_input_grad)
        for rows_C, logits_CV in head.chunks():
            given = targets_N[rows_C], grads_N[rows_C], others[0][rows_C]
            logits_CV.copy_(differentiate_both(logits_CV, *given, ctx.transform))
            head.add_gradients(rows_C, logits_CV)
        gradients = zip(head.gradients, inputs, strict=True)
        return (*(None if grad is None else grad.to(tensor.dtype) for grad, tensor in gradients), *[None] * 4)
