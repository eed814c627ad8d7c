"""Log-probabilities of tokens directly from hidden states, without the complete N x V matrix of logits in memory.

The head of a small model takes a quarter of the arithmetic, and its logits would take most of the memory. Rows without
a target are skipped; the others are processed in chunks.

Legend: N tokens, K rows with a target, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ingle.kernels import IGNORE_INDEX
from ingle.kernels.layers.logits import LogitTransform, accumulator, differentiate_, score

#: Logits of one chunk; 2^24 of them are 32 MiB in bfloat16, and a chunk of 500 rows still fills the cores.
CHUNK_LOGITS = 1 << 24
#: Rows of a chunk are a multiple of this: a product with a ragged last tile of rows is 6 to 20 % slower.
ROW_TILE = 64


def token_logps(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Returns the log-probability of each target, ``log softmax(f(hidden W^T + bias))[target]``.

    ``f(z) = softcap * tanh(logit_scale * z / softcap)``, or ``logit_scale * z`` without a softcap. Products run in the
    dtype of ``hidden``; the softmax and the gradients of weight and bias accumulate in float32. Backward recomputes the
    logits of each chunk, so forward and backward each need memory only for the logits of one chunk.

    Args:
        hidden_NH: Hidden states, float, [N, H].
        weight_VH: Output embedding, [V, H]; cast to the dtype of ``hidden`` for the product.
        targets_N: Token ids, int64, [N].
        bias: Bias of the logits, [V].
        logit_scale: Positive factor on the logits.
        softcap: Bound on the logits (Gemma 2, arXiv 2408.00118, section 2).
        chunk_size: Number of rows in a chunk; by default a multiple of 64 with about 2^24 logits.

    Returns:
        float32 [N] (float64 for float64 hidden states), 0 where the target is ``IGNORE_INDEX``. Differentiable once
        in hidden, weight and bias, for any gradient of the result.
    """
    transform = LogitTransform(logit_scale, softcap)
    logps_N: Tensor = TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, bias, targets_N, transform, chunk_size
    )
    return logps_N


class TokenLogps(torch.autograd.Function):
    """The product, softmax and selection, which keep no logits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias: Tensor | None,
        targets_N: Tensor,
        transform: LogitTransform,
        chunk_size: int | None,
    ) -> Tensor:
        """Returns the log-probabilities."""
        head = ChunkedHead(hidden_NH, weight_VH, bias, targets_N, chunk_size)
        logps_N = torch.zeros(targets_N.shape, dtype=accumulator(hidden_NH.dtype), device=hidden_NH.device)
        for rows_C, logits_CV in head.chunks():
            logps_N[rows_C] = score(logits_CV, targets_N[rows_C], transform)
        ctx.transform, ctx.chunk_size = transform, chunk_size
        ctx.save_for_backward(hidden_NH, weight_VH, bias, targets_N, logps_N)
        return logps_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grads_N: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden states, weight and bias."""
        hidden_NH, weight_VH, bias, targets_N, logps_N = ctx.saved_tensors
        inputs = hidden_NH, weight_VH, bias
        head = ChunkedHead(*inputs, targets_N, ctx.chunk_size)
        head.make_gradients(ctx.needs_input_grad)
        for rows_C, logits_CV in head.chunks():
            differentiate_(logits_CV, targets_N[rows_C], logps_N[rows_C], grads_N[rows_C].contiguous(), ctx.transform)
            head.add_gradients(rows_C, logits_CV)
        gradients = zip(head.gradients, inputs, strict=True)
        return (*(None if grad is None else grad.to(tensor.dtype) for grad, tensor in gradients), None, None, None)


class ChunkedHead:
    """An output layer applied to the rows that have a target, chunk by chunk.

    Args:
        hidden_NH: Hidden states.
        weight_VH: Output embedding.
        bias: Bias of the logits, [V].
        targets_N: Token ids.
        chunk_size: Number of rows in a chunk; None for the default.

    Attributes:
        gradients: Gradients of hidden, weight and bias, or None. Those of weight and bias are float32 sums.
    """

    def __init__(
        self, hidden_NH: Tensor, weight_VH: Tensor, bias: Tensor | None, targets_N: Tensor, chunk_size: int | None
    ) -> None:
        dtype = hidden_NH.dtype
        self._hidden_NH, self._weight_VH = hidden_NH.detach(), weight_VH.detach().to(dtype)
        self._bias_V = None if bias is None else bias.detach().to(dtype)
        self._kept_K = torch.nonzero(targets_N != IGNORE_INDEX).flatten()
        self._keeps_all = len(self._kept_K) == len(targets_N)
        self._step = chunk_size or max(CHUNK_LOGITS // len(weight_VH) // ROW_TILE * ROW_TILE, ROW_TILE)
        self.gradients: list[Tensor | None] = [None, None, None]

    def chunks(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yields the rows of each chunk and their raw logits [C, V], which the next chunk overwrites."""
        num_kept = len(self._kept_K)
        buffer = self._hidden_NH.new_empty(min(self._step, num_kept), len(self._weight_VH))
        for start in range(0, num_kept, self._step):
            stop = min(start + self._step, num_kept)
            rows_C = slice(start, stop) if self._keeps_all else self._kept_K[start:stop]
            logits_CV = torch.mm(self._hidden_NH[rows_C], self._weight_VH.t(), out=buffer[: stop - start])
            if self._bias_V is not None:
                logits_CV += self._bias_V
            yield rows_C, logits_CV

    def make_gradients(self, needed: Sequence[bool]) -> None:
        """Allocates the needed gradients of hidden, weight and bias as zeros."""
        inputs = self._hidden_NH, self._weight_VH, self._bias_V
        wide = accumulator(self._hidden_NH.dtype)
        self.gradients = [
            torch.zeros_like(tensor, dtype=dtype) if tensor is not None and need else None
            for tensor, dtype, need in zip(inputs, (None, wide, wide), needed, strict=False)
        ]

    def add_gradients(self, rows_C: slice | Tensor, gradient_CV: Tensor) -> None:
        """Adds the gradients that flow through the logits of one chunk."""
        hidden, weight, bias = self.gradients
        if hidden is not None and self._keeps_all:
            torch.mm(gradient_CV, self._weight_VH, out=hidden[rows_C])
        elif hidden is not None:
            hidden[rows_C] = gradient_CV @ self._weight_VH
        if weight is not None and weight.dtype == gradient_CV.dtype:
            weight.addmm_(gradient_CV.t(), self._hidden_NH[rows_C])
        elif weight is not None:
            weight += gradient_CV.t() @ self._hidden_NH[rows_C]
        if bias is not None:
            bias += gradient_CV.sum(0, dtype=bias.dtype)
