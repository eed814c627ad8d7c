"""Chooses tokens by a race of their logits with noise from counters.

The token is the argmax of ``z_j + g_j`` with Gumbel noise ``g_j``, which is a sample of ``softmax(z)``. The noise is a
function of a key and of j. So two distributions that differ little mostly choose the same token: with probability
between ``1 - 2 TV / (1 + TV)`` and ``1 - TV``, where TV is their distance in total variation (Daliri, Musco and Suresh
2024, "Coupling without communication and drafter-invariant speculative decoding", arXiv 2408.07978).

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from torch import Tensor

from ingle.kernels.layers.logits import LogitTransform, describe, score, transformed
from ingle.kernels.numba.cache import compile_float_kernel
from ingle.kernels.numba.scalars import bits, exp, largest, load, supported
from ingle.kernels.threads import match_threads

#: Keys of the noise, uint64; one for each row.
Keys = npt.NDArray[np.uint64]

#: The step of SplitMix64 (Steele, Lea and Flood 2014), and the factors of its output function.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
#: Noise has 52 bits; half a step keeps it inside of (0, 1).
_UNIT = 2.0**-52
#: More than the relative error of a float32 exponential, so that no winner is passed over.
_SLACK = 1.0 + 1e-4


class Drawn(NamedTuple):
    """Tokens and their figures.

    Attributes:
        tokens: int64 [C].
        logps: Log-probability of each token in nats, float32 [C]; with the bits of ``score`` of the same logits.
        entropies: Entropy of each distribution in nats, float32 [C].
    """

    tokens: Tensor
    logps: Tensor
    entropies: Tensor


def draw(
    logits_CV: Tensor,
    keys_C: Keys | None,
    transform: LogitTransform,
    *,
    top_p: float = 1.0,
    forced: Tensor | None = None,
) -> Drawn:
    """Draws the token of each row.

    Args:
        logits_CV: Raw logits, float.
        keys_C: Keys of the noise; None takes the most likely tokens.
        transform: What is done with the logits, the temperature included.
        top_p: Draw from the most likely tokens that together reach this probability; figures are of that distribution.
        forced: Tokens that are taken whatever the race says, int64 [C]; -1 for none.
    """
    if top_p < 1 and keys_C is not None:
        logits_CV = keep_likely(logits_CV, transform, top_p)
    tokens_C = logits_CV.argmax(-1) if keys_C is None else race(logits_CV, keys_C, transform)
    if forced is not None:
        tokens_C = torch.where(forced >= 0, forced, tokens_C)
    _, entropies_C, _ = describe(logits_CV, tokens_C, transform)
    return Drawn(tokens_C, score(logits_CV, tokens_C, transform), entropies_C)


def race(logits_CV: Tensor, keys_C: Keys, transform: LogitTransform) -> Tensor:
    """Returns the token that wins the race in each row, int64 [C].

    Args:
        logits_CV: Raw logits, float.
        keys_C: Keys of the noise.
        transform: What is done with the logits, the temperature included.
    """
    if not supported(logits_CV):
        return _race(logits_CV, keys_C, transform)
    tokens_C = np.empty(len(logits_CV), np.int64)
    match_threads(logits_CV.numel())
    race_rows(bits(logits_CV), keys_C, *transform.numbers(), tokens_C)
    return torch.from_numpy(tokens_C)


def keep_likely(logits_CV: Tensor, transform: LogitTransform, top_p: float) -> Tensor:
    """Returns raw logits that are minus infinity but for the most likely tokens that together reach ``top_p``.

    Source: Holtzman et al. 2019, "The curious case of neural text degeneration" (arXiv 1904.09751), section 3.1.
    """
    probabilities_CV = transform(logits_CV)[0].softmax(-1)
    sorted_CV, order_CV = torch.sort(probabilities_CV, dim=-1, descending=True, stable=True)
    outside_CV = (sorted_CV.cumsum(-1) - sorted_CV) >= top_p
    outside_CV[:, 0] = False
    return logits_CV.masked_fill(torch.zeros_like(outside_CV).scatter_(-1, order_CV, outside_CV), -torch.inf)


def _race(logits_CV: Tensor, keys_C: Keys, transform: LogitTransform) -> Tensor:
    """Reference of :func:`race` on any device."""
    steps_V = torch.arange(1, logits_CV.shape[1] + 1, device=logits_CV.device) * _signed(_GOLDEN)
    keys_C1 = torch.from_numpy(keys_C.astype(np.int64))[:, None].to(logits_CV.device)
    x = keys_C1 + steps_V  # wraps around, like unsigned numbers
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    uniform_CV = (_shifted(x ^ _shifted(x, 31), 12).double() + 0.5) * _UNIT
    return (transform(logits_CV)[0].double() - (-uniform_CV.log()).log()).argmax(-1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _shifted(x: Tensor, count: int) -> Tensor:
    """Returns the bits shifted to the right, with zeros from the left."""
    return (x >> count) & ((1 << (64 - count)) - 1)


@compile_float_kernel
def race_rows(logits, keys, scale, softcap, tokens):  # type: ignore[no-untyped-def]
    """Per row, in cache: exponentials of the logits, then the race."""
    num_rows, vocabulary = logits.shape
    for i in prange(num_rows):
        row = logits[i]
        weights = np.empty(vocabulary, np.float32)
        shift = transformed(largest(row), scale, softcap)
        for j in range(vocabulary):
            weights[j] = exp(transformed(load(row, j), scale, softcap) - shift)
        tokens[i] = _winner(row, weights, keys[i], scale, softcap, shift)


@njit(error_model="numpy")
def _winner(row, weights, key, scale, softcap, shift):  # type: ignore[no-untyped-def]
    """Returns the argmax of ``z_j - log(-log u_j)``.

    Token j wins only if ``-log u_j < exp(z_j - best)``, and ``-log u_j >= 1 - u_j``; so few logarithms are needed.
    """
    winner, best, reach = 0, -np.inf, np.inf
    counter = key
    for j in range(len(weights)):
        counter += np.uint64(_GOLDEN)
        x = (counter ^ (counter >> np.uint64(30))) * np.uint64(_FIRST)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
        x = (x ^ (x >> np.uint64(31))) >> np.uint64(12)
        uniform = (np.float64(np.int64(x)) + 0.5) * _UNIT
        if 1.0 - uniform < np.float64(weights[j]) * reach:
            value = np.float64(transformed(load(row, j), scale, softcap)) - np.log(-np.log(uniform))
            if value > best:
                winner, best = j, value
                reach = np.exp(np.float64(shift) - best) * _SLACK
    return winner
