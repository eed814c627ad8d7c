"""Divergence between the predictions of two models, token by token, directly from their hidden states.

The logits of a few rows exist at a time, of both models. Forward computes the gradient in the hidden states with the
divergence, and backward scales its rows; only the gradient of an output layer that is trained needs the logits again.

Legend: N tokens, H hidden size of the student, G that of the teacher, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ingle.kernels.layers.logits import LogitTransform, accumulator
from ingle.kernels.layers.token_logps import CHUNK_LOGITS, ChunkedHead


class Predictions(NamedTuple):
    """Predictions of a model, as what they are computed from.

    Attributes:
        hidden: Hidden states, ``[N, H]``.
        weight: Output embedding, ``[V, H]``.
        bias: Bias of the logits, ``[V]`` or None.
        transform: What turns raw logits into logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = LogitTransform()


def linear_divergence(
    student: Predictions, teacher: Predictions, targets_N: Tensor, beta: float, *, chunk_size: int | None = None
) -> Tensor:
    """Returns the generalized Jensen-Shannon divergence of a student S from a teacher T at each token.

    ``beta KL(T || M) + (1 - beta) KL(S || M)`` with ``M = (1 - beta) S + beta T``. By convention 0 stands for the
    forward divergence ``KL(T || S)`` and 1 for the reverse ``KL(S || T)``, which are no limits of the formula.

    Args:
        student: Gradients flow through its hidden states, weight and bias.
        teacher: Over the same vocabulary; without gradients.
        targets_N: ``IGNORE_INDEX`` where there is nothing to compare, int64.
        beta: Weight of the teacher in the mixture.
        chunk_size: Number of rows in a chunk; None for the default.

    Returns:
        Nats, float32 [N] (float64 for float64 hidden states); 0 where there is nothing to compare.

    Source: Agarwal et al. 2024, "On-policy distillation of language models" (arXiv 2306.13649), equation 1; Hsu et al.
    2024, "Liger Kernel" (arXiv 2410.10989), section 3.2, for the gradient in forward.
    """
    assert len(student.weight) == len(teacher.weight), "two vocabularies"
    assert 0 <= beta <= 1
    divergences: Tensor = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        student.hidden, student.weight, student.bias, student.transform, teacher, targets_N, beta, chunk_size
    )
    return divergences


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        teacher: Predictions,
        targets_N: Tensor,
        beta: float,
        chunk_size: int | None,
    ) -> Tensor:
        ctx.arguments = transform, teacher, targets_N, beta, chunk_size
        own, other = _heads(hidden_NH, weight_VH, bias, teacher, targets_N, chunk_size)
        needs_hidden = ctx.needs_input_grad[0]
        own.make_gradients([needs_hidden, False, False])
        found_N = torch.zeros(targets_N.shape, dtype=accumulator(hidden_NH.dtype), device=hidden_NH.device)
        for (rows_C, logits_CV), (_, theirs_CV) in zip(own.chunks(), other.chunks(), strict=True):
            values_C, gradient_CV = _compare(logits_CV, theirs_CV, transform, teacher.transform, beta)
            found_N[rows_C] = values_C
            if needs_hidden:
                own.add_gradients(rows_C, gradient_CV.to(logits_CV.dtype))
        ctx.save_for_backward(hidden_NH, weight_VH, bias, own.gradients[0])
        return found_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grads_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias, gradient_NH = ctx.saved_tensors
        transform, teacher, targets_N, beta, chunk_size = ctx.arguments
        of_hidden = None if gradient_NH is None else (gradient_NH * grads_N[:, None]).to(hidden_NH.dtype)
        needed = [False, *ctx.needs_input_grad[1:3]]
        if not any(needed):
            return (of_hidden, *[None] * 7)
        own, other = _heads(hidden_NH, weight_VH, bias, teacher, targets_N, chunk_size)
        own.make_gradients(needed)
        for (rows_C, logits_CV), (_, theirs_CV) in zip(own.chunks(), other.chunks(), strict=True):
            _, gradient_CV = _compare(logits_CV, theirs_CV, transform, teacher.transform, beta)
            own.add_gradients(rows_C, (gradient_CV * grads_N[rows_C, None]).to(logits_CV.dtype))
        _, of_weight, of_bias = own.gradients
        of_weight = None if of_weight is None else of_weight.to(weight_VH.dtype)
        of_bias = None if of_bias is None or bias is None else of_bias.to(bias.dtype)
        return (of_hidden, of_weight, of_bias, *[None] * 5)


def _heads(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias: Tensor | None,
    teacher: Predictions,
    targets_N: Tensor,
    chunk_size: int | None,
) -> tuple[ChunkedHead, ChunkedHead]:
    # Smaller chunks than those of one model, for the logits of two and what is computed from them.
    step = chunk_size or max(16, CHUNK_LOGITS // (4 * len(weight_VH)))
    own = ChunkedHead(hidden_NH, weight_VH, bias, targets_N, step)
    return own, ChunkedHead(teacher.hidden, teacher.weight, teacher.bias, targets_N, step)


def _compare(
    logits_CV: Tensor, theirs_CV: Tensor, transform: LogitTransform, of_teacher: LogitTransform, beta: float
) -> tuple[Tensor, Tensor]:
    """Returns the divergence of each row, [C], and its gradient in the student's raw logits, [C, V].

    With ``g = dD/dS``, the gradient is ``S (g - sum S g)`` times the slope of the transform.
    """
    z_CV, slope = transform(logits_CV)
    least = torch.finfo(z_CV.dtype).min / 4  # of a token that a model rules out: 0 times infinity is NaN
    student_CV = z_CV.log_softmax(-1).clamp_min(least)
    teacher_CV = of_teacher(theirs_CV)[0].to(z_CV.dtype).log_softmax(-1).clamp_min(least)
    s_CV, t_CV = student_CV.exp(), teacher_CV.exp()
    if beta == 0:
        return (t_CV * (teacher_CV - student_CV)).sum(-1), (s_CV - t_CV) * slope
    if beta == 1:
        g_CV = student_CV - teacher_CV
        values_C = (s_CV * g_CV).sum(-1)
    else:
        mixture_CV = torch.logaddexp(student_CV + math.log1p(-beta), teacher_CV + math.log(beta))
        ratio_CV = student_CV - mixture_CV
        values_C = beta * (t_CV * (teacher_CV - mixture_CV)).sum(-1) + (1 - beta) * (s_CV * ratio_CV).sum(-1)
        g_CV = (1 - beta) * (ratio_CV - beta * (teacher_CV - mixture_CV).exp() - (1 - beta) * ratio_CV.exp())
    return values_C, s_CV * (g_CV - (s_CV * g_CV).sum(-1, keepdim=True)) * slope
