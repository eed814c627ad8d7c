"""Losses of policies per token: tensors in, tensors out.

Every function returns a value per token; :func:`aggregate` sums them, and the sum is divided by a count of the whole
optimizer step. The gradient is therefore the same however a step is split.

Legend: N tokens of a row of answers, D answers in it, V vocabulary. Log-probabilities and divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ingle.config.policy import Aggregation, ClipKind, Importance, KlEstimator

#: Bound on the logarithm of a ratio, as in verl: its exponential stays finite.
LOG_RATIO_LIMIT = 20.0

#: The count that a loss is divided by.
DENOMINATORS: Mapping[Aggregation, str] = {
    "tokens": "completion_tokens",
    "answers": "sequences",
    "answer_sums": "sequences",
    "constant": "slots",
}


@dataclass(frozen=True)
class Rows:
    """The answers that lie end to end in a row.

    Attributes:
        counted: Tokens that count, bool [N]: those that the policy chose, of answers with a reward.
        documents: Number of each token's answer, int64 [N].
        number: D.
    """

    counted: Tensor
    documents: Tensor
    number: int

    def sums(self, values_N: Tensor) -> Tensor:
        """Returns the sum over the counted tokens of each answer, [D]."""
        kept_N = torch.where(self.counted, values_N, 0)
        return kept_N.new_zeros(self.number).index_add(0, self.documents, kept_N)

    def lengths(self, like: Tensor) -> Tensor:
        """Returns the number of counted tokens of each answer in the dtype of a tensor, [D]."""
        return self.sums(torch.ones_like(self.documents, dtype=like.dtype))

    def counts(self, max_new_tokens: int) -> dict[str, float]:
        """Returns the denominators of :data:`DENOMINATORS`; answers without a counted token are in none.

        Args:
            max_new_tokens: Tokens that an answer could have had.
        """
        lengths_D = torch.bincount(self.documents[self.counted], minlength=self.number)
        answers = float(torch.count_nonzero(lengths_D))
        return {
            "completion_tokens": float(lengths_D.sum()),
            "sequences": answers,
            "slots": answers * max_new_tokens,
        }


@dataclass(frozen=True)
class Clip:
    """How far a ratio may move from 1.

    - ``ppo``: ``max(-A r, -A clip(r, 1 - low, 1 + high))`` (arXiv 1707.06347, equation 7; ``high`` of its own as in
      DAPO, arXiv 2503.14476).
    - ``two_sided``: the same with ``min(r, bound)`` in its first branch (INTELLECT-2, arXiv 2505.07291).
    - ``dual``: the loss of ``ppo``, at most ``-A bound`` for negative A (arXiv 1912.09729).
    - ``cispo``: ``-sg(min(r, bound)) A log p`` (arXiv 2506.13585); no token loses its gradient.
    - ``none``: ``-A r``.

    Attributes:
        kind: As above.
        low: Distance below 1.
        high: Distance above 1.
        bound: Largest ratio of ``two_sided``, ``dual`` and ``cispo``: not a distance from 1.
    """

    kind: ClipKind = "ppo"
    low: float = 0.2
    high: float = 0.2
    bound: float = math.inf


class PolicyTerms(NamedTuple):
    """The loss of each token.

    Attributes:
        losses: [N], differentiable.
        low: Where the lower bound on the ratio decided, bool [N].
        high: Where an upper bound decided, bool [N].
    """

    losses: Tensor
    low: Tensor
    high: Tensor


def log_ratios(logps_N: Tensor, old_logps_N: Tensor, rows: Rows, importance: Importance) -> Tensor:
    """Returns the logarithm of the ratio of each token's probability to that of the sampling policy, [N].

    - ``token``: ``log p - log p_old`` of the token.
    - ``sequence``: the sum over its answer: with ``answer_sums``, the gradient of the ratio of whole answers (RLOO).
    - ``sequence_mean``: the mean over its answer: with ``answers``, the gradient of GSPO (arXiv 2507.18071).
    - ``none``: 0. With :func:`policy_losses`, the gradient of REINFORCE.

    Beyond the first, the value belongs to the answer and the gradient to the token, so that the gradients of the tokens
    add up to that of the answer.
    """
    if importance == "token":
        return (logps_N - old_logps_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    own_N = logps_N - logps_N.detach()
    if importance == "none":
        return own_N
    sums_D = rows.sums((logps_N - old_logps_N).detach())
    if importance == "sequence_mean":
        sums_D = sums_D / rows.lengths(sums_D).clamp_min(1)
    return own_N + sums_D.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[rows.documents]


def policy_losses(logps_N: Tensor, log_ratios_N: Tensor, advantages_N: Tensor, clip: Clip) -> PolicyTerms:
    """Computes the loss of each token whose gradient raises the probability of tokens with positive advantages.

    Args:
        logps_N: Log-probabilities under the policy; only ``cispo`` reads them.
        log_ratios_N: Result of :func:`log_ratios`.
        advantages_N: Advantages, without gradient.
        clip: Bounds on the ratio.
    """
    ratios_N = log_ratios_N.exp()
    positive_N, negative_N = advantages_N > 0, advantages_N < 0
    above_N = ratios_N > clip.bound
    nowhere_N = torch.zeros_like(positive_N)
    if clip.kind == "cispo":
        weights_N = ratios_N.detach().clamp_max(clip.bound)
        return PolicyTerms(-weights_N * advantages_N * logps_N, nowhere_N, above_N)
    if clip.kind == "none":
        return PolicyTerms(-advantages_N * ratios_N, nowhere_N, nowhere_N)
    first_N = ratios_N.clamp_max(clip.bound) if clip.kind == "two_sided" else ratios_N
    clipped_N = ratios_N.clamp(1 - clip.low, 1 + clip.high)
    losses_N = torch.maximum(-advantages_N * first_N, -advantages_N * clipped_N)
    low_N = negative_N & (ratios_N < 1 - clip.low)
    high_N = positive_N & (ratios_N > 1 + clip.high)
    if clip.kind == "ppo":
        return PolicyTerms(losses_N, low_N, high_N)
    if clip.kind == "dual":
        losses_N = torch.where(negative_N, torch.minimum(losses_N, -advantages_N * clip.bound), losses_N)
    return PolicyTerms(losses_N, low_N, high_N | (negative_N & above_N))


def value_losses(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip_range: float | None
) -> tuple[Tensor, Tensor]:
    """Computes ``0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)`` for each token.

    Args:
        values_N: Values, with gradient.
        old_values_N: Values when the answers were sampled.
        returns_N: What they shall predict.
        clip_range: Largest change per iteration, in units of the reward; None for no bound.

    Returns:
        The losses [N], and where the bound decided, bool [N].

    Source: Huang et al. 2024, "The N+ implementation details of RLHF with PPO" (arXiv 2403.17031), its published code.
    """
    losses_N = (values_N - returns_N) ** 2
    if clip_range is None:
        return losses_N / 2, torch.zeros_like(losses_N, dtype=torch.bool)
    clipped_N = torch.clamp(values_N, old_values_N - clip_range, old_values_N + clip_range)
    bounded_N = (clipped_N - returns_N) ** 2
    return torch.maximum(losses_N, bounded_N) / 2, bounded_N > losses_N


def kl_terms(
    logps_N: Tensor, reference_logps_N: Tensor, estimator: KlEstimator, old_logps_N: Tensor | None = None
) -> Tensor:
    """Estimates ``KL(policy || reference)`` at each token from the token that was sampled, [N].

    With ``x = log q - log p`` of reference q and policy p: ``k1 = -x``, ``k2 = x^2 / 2``, ``k3 = e^x - 1 - x``, and
    ``k3_corrected = k3 p / p_old``. The mean of k1 and k3 is the divergence. As losses of tokens they differ:

    ===============  ======================================================================
    loss             expected gradient, with the tokens before held fixed
    ===============  ======================================================================
    k1               0; it teaches only as part of the reward
    k2               that of ``KL(policy || reference)``
    k3               that of ``KL(reference || policy)``
    k3_corrected     that of ``KL(policy || reference)``
    ===============  ======================================================================

    Summed over an answer first (``x`` of whole answers), k2 has the gradient of the divergence of answers, which also
    contains how a token changes the ones after it.

    Args:
        logps_N: Log-probabilities under the policy.
        reference_logps_N: The same under the reference.
        estimator: As above.
        old_logps_N: Those of the sampling policy, for ``k3_corrected``; None for the values of ``logps_N``.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    x_N = reference_logps_N - logps_N
    match estimator:
        case "k1":
            return -x_N
        case "k2":
            return x_N**2 / 2
    x_N = x_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    values_N = torch.expm1(x_N) - x_N
    if estimator == "k3":
        return values_N
    old_logps_N = logps_N.detach() if old_logps_N is None else old_logps_N
    return values_N * (logps_N - old_logps_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def divergence(student_logps_NV: Tensor, teacher_logps_NV: Tensor, beta: float) -> Tensor:
    """Computes the generalized Jensen-Shannon divergence of student S from teacher T for each token, [N].

    ``beta KL(T || M) + (1 - beta) KL(S || M)`` with ``M = (1 - beta) S + beta T``. By convention 0 stands for the
    forward divergence ``KL(T || S)`` and 1 for the reverse ``KL(S || T)``. They are no limits of the formula, which
    vanishes near both ends.

    Args:
        student_logps_NV: Log-probabilities over the vocabulary.
        teacher_logps_NV: The same of the teacher.
        beta: Weight of the teacher in the mixture.

    Source: Agarwal et al. 2024, "On-policy distillation of language models" (arXiv 2306.13649), equation 1.
    """
    if beta == 0:
        return _kl(teacher_logps_NV, student_logps_NV)
    if beta == 1:
        return _kl(student_logps_NV, teacher_logps_NV)
    mixture_NV = torch.logaddexp(student_logps_NV + math.log1p(-beta), teacher_logps_NV + math.log(beta))
    return beta * _kl(teacher_logps_NV, mixture_NV) + (1 - beta) * _kl(student_logps_NV, mixture_NV)


def aggregate(values_N: Tensor, rows: Rows, how: Aggregation) -> Tensor:
    """Returns the numerator of a mean over the counted tokens; its denominator is ``DENOMINATORS[how]``.

    ``tokens``, ``answer_sums`` and ``constant`` add all tokens; ``answers`` adds the mean of each answer.
    """
    sums_D = rows.sums(values_N)
    return (sums_D / rows.lengths(sums_D).clamp_min(1) if how == "answers" else sums_D).sum()


def _kl(p_logps_NV: Tensor, q_logps_NV: Tensor) -> Tensor:
    return (p_logps_NV.exp() * (p_logps_NV - q_logps_NV)).sum(-1)
