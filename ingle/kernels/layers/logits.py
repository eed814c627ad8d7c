"""Log-probabilities of target tokens from the raw logits of a few rows, and their gradient in place of the logits.

Each function has three implementations: numba on a CPU, Triton on a CUDA device, and torch, which is the reference.

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import FAST, bits, exp, largest, load, store, supported
from ingle.kernels.threads import match_threads


@dataclass(frozen=True)
class LogitTransform:
    """``softcap * tanh(scale * z / softcap)`` of a raw logit z, or ``scale * z`` without a softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        assert self.scale > 0, "a logit scale that is not positive reverses the ranking of tokens"

    def __call__(self, raw: Tensor) -> tuple[Tensor, float | Tensor]:
        """Returns the transformed logits and the derivative of the transform."""
        z = raw.to(accumulator(raw.dtype)) * self.scale
        if not self.softcap:
            return z, self.scale
        tanh = torch.tanh(z / self.softcap)
        return self.softcap * tanh, self.scale * (1 - tanh**2)

    def at(self, temperature: float) -> LogitTransform:
        """Returns the transform of logits that are divided by a temperature after the softcap."""
        return LogitTransform(self.scale / temperature, None if not self.softcap else self.softcap / temperature)

    def numbers(self) -> tuple[Any, Any]:
        """Returns the scale and the softcap as float32, for kernels; a softcap of 0 means none."""
        return np.float32(self.scale), np.float32(self.softcap or 0.0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over values of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def score(logits_CV: Tensor, targets_C: Tensor, transform: LogitTransform) -> Tensor:
    """Returns log-probabilities of the targets, float32 [C] (float64 for float64 logits)."""
    if supported(logits_CV):
        return -_score_with_numba(logits_CV, targets_C, transform, with_gradient=False)
    if _has_triton_kernel(logits_CV):
        from ingle.kernels.triton.logits import score_rows as score_on_gpu

        return score_on_gpu(logits_CV, targets_C, *transform.numbers())
    z_CV, _ = transform(logits_CV)
    return z_CV.log_softmax(-1).gather(1, targets_C[:, None])[:, 0]


def describe(logits_CV: Tensor, targets_C: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities of the targets, entropies, and ``log sum p^2``, each as :func:`score` returns them."""
    if supported(logits_CV):
        match_threads(logits_CV.numel())
        found = [np.empty(len(targets_C), np.float32) for _ in range(3)]
        describe_rows(bits(logits_CV), targets_C.numpy(), *transform.numbers(), *found)
        logps, entropies, squares = map(torch.from_numpy, found)
        return logps, entropies, squares
    logps_CV = transform(logits_CV)[0].log_softmax(-1)
    entropies_C = -(logps_CV.exp() * logps_CV.clamp_min(torch.finfo(logps_CV.dtype).min)).sum(-1)
    return logps_CV.gather(1, targets_C[:, None])[:, 0], entropies_C, (2 * logps_CV).logsumexp(-1)


def score_with_gradient_(logits_CV: Tensor, targets_C: Tensor, transform: LogitTransform) -> Tensor:
    """Returns the result of :func:`score`, and overwrites the logits by the gradient of *minus* its sum."""
    if supported(logits_CV):
        return -_score_with_numba(logits_CV, targets_C, transform, with_gradient=True)
    logps_C = score(logits_CV, targets_C, transform)
    differentiate_(logits_CV, targets_C, logps_C, torch.full_like(logps_C, -1.0), transform)
    return logps_C


def differentiate_(
    logits_CV: Tensor, targets_C: Tensor, logps_C: Tensor, grads_C: Tensor, transform: LogitTransform
) -> None:
    """Overwrites the raw logits by the gradient in them of ``sum(grads * logps)``.

    Args:
        logits_CV: Raw logits.
        targets_C: Token ids, int64.
        logps_C: As :func:`score` returned them; with the target's logit they give the log-sum-exp of the row.
        grads_C: Gradient of each log-probability, in the dtype of ``logps_C``.
        transform: As for :func:`score`.
    """
    if supported(logits_CV):
        match_threads(logits_CV.numel())
        arrays = logps_C.numpy(), grads_C.numpy()
        differentiate_rows(bits(logits_CV), targets_C.numpy(), *transform.numbers(), *arrays)
        return
    if _has_triton_kernel(logits_CV):
        from ingle.kernels.triton.logits import differentiate_rows as differentiate_on_gpu

        differentiate_on_gpu(logits_CV, targets_C, logps_C, grads_C, *transform.numbers())
        return
    z_CV, slope = transform(logits_CV)
    lse_C1 = z_CV.gather(1, targets_C[:, None]) - logps_C[:, None]
    gradient_CV = (z_CV - lse_C1).exp_().mul_(-grads_C[:, None])
    gradient_CV.scatter_add_(1, targets_C[:, None], grads_C[:, None])
    logits_CV.copy_(gradient_CV * slope)


def differentiate_both(
    logits_CV: Tensor, targets_C: Tensor, logp_grads_C: Tensor, entropy_grads_C: Tensor, transform: LogitTransform
) -> Tensor:
    """Returns the gradient in the raw logits of weighted sums of log-probabilities and entropies, [C, V]."""
    z_CV, slope = transform(logits_CV)
    logps_CV = z_CV.log_softmax(-1)
    chances_CV = logps_CV.exp()
    entropies_C1 = -(chances_CV * logps_CV).sum(-1, keepdim=True)
    gradient_CV = -chances_CV * (logp_grads_C[:, None] + entropy_grads_C[:, None] * (logps_CV + entropies_C1))
    gradient_CV.scatter_add_(1, targets_C[:, None], logp_grads_C[:, None])
    return gradient_CV * slope


def _has_triton_kernel(logits_CV: Tensor) -> bool:
    return logits_CV.is_cuda and logits_CV.dtype != torch.float64 and importlib.util.find_spec("triton") is not None


def _score_with_numba(
    logits_CV: Tensor, targets_C: Tensor, transform: LogitTransform, *, with_gradient: bool
) -> Tensor:
    match_threads(logits_CV.numel())
    nll_C = np.empty(len(targets_C), np.float32)
    score_rows(bits(logits_CV), targets_C.numpy(), *transform.numbers(), with_gradient, nll_C)
    return torch.from_numpy(nll_C)


@njit(fastmath=FAST)
def transformed(raw, scale, softcap):  # type: ignore[no-untyped-def]
    """Computes :class:`LogitTransform` of a raw logit."""
    z = raw * scale
    if softcap > np.float32(0.0):
        z = softcap * (np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * z / softcap) + np.float32(1.0)))
    return z


@njit(fastmath=FAST)
def _slope(z, scale, softcap):  # type: ignore[no-untyped-def]
    """Returns the derivative of :func:`_transform` at the point where its value is z."""
    return scale * (np.float32(1.0) - (z / softcap) * (z / softcap)) if softcap > np.float32(0.0) else scale


@compile_float_kernel
def score_rows(logits, targets, scale, softcap, with_gradient, nll):  # type: ignore[no-untyped-def]
    """Per row, in cache: log-sum-exp and loss; with a gradient, softmax minus one-hot in place of the logits."""
    num_rows, vocabulary = logits.shape
    for i in prange(num_rows):
        row = logits[i]
        shift = transformed(largest(row), scale, softcap)
        total = np.float32(0.0)
        for j in range(vocabulary):
            total += exp(transformed(load(row, j), scale, softcap) - shift)
        z_target = transformed(load(row, targets[i]), scale, softcap)
        nll[i] = np.log(total) + shift - z_target
        if with_gradient:
            inverse = np.float32(1.0) / total
            for j in range(vocabulary):
                z = transformed(load(row, j), scale, softcap)
                store(row, j, exp(z - shift) * inverse * _slope(z, scale, softcap))
            probability = exp(z_target - shift) * inverse
            store(row, targets[i], (probability - np.float32(1.0)) * _slope(z_target, scale, softcap))


@compile_float_kernel
def describe_rows(logits, targets, scale, softcap, logps, entropies, squares):  # type: ignore[no-untyped-def]
    """Per row, in cache: log-probability of the target, entropy, and logarithm of the sum of squares."""
    num_rows, vocabulary = logits.shape
    for i in prange(num_rows):
        row = logits[i]
        shift = transformed(largest(row), scale, softcap)
        total, weighted, squared = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for j in range(vocabulary):
            z = max(transformed(load(row, j), scale, softcap) - shift, np.float32(-1e30))  # 0 times -inf is NaN
            power = exp(z)
            total += power
            weighted += power * z
            squared += power * power
        log_total = np.log(total)
        logps[i] = transformed(load(row, targets[i]), scale, softcap) - shift - log_total
        entropies[i] = log_total - weighted / total
        squares[i] = np.log(squared) - np.float32(2.0) * log_total


@compile_float_kernel
def differentiate_rows(logits, targets, scale, softcap, logps, grads):  # type: ignore[no-untyped-def]
    """Per row: ``grad * (one-hot - softmax)`` in place of the logits."""
    num_rows, vocabulary = logits.shape
    for i in prange(num_rows):
        row, grad = logits[i], grads[i]
        z_target = transformed(load(row, targets[i]), scale, softcap)
        lse = z_target - logps[i]
        for j in range(vocabulary):
            z = transformed(load(row, j), scale, softcap)
            store(row, j, -grad * exp(z - lse) * _slope(z, scale, softcap))
        store(row, targets[i], grad * (np.float32(1.0) - exp(logps[i])) * _slope(z_target, scale, softcap))
