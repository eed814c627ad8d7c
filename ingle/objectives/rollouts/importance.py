"""Importance weights: how far the policy that is trained is from the sampler whose answers it learns from.

Legend: R answers, N tokens of all answers end to end.
"""

from __future__ import annotations

import numpy as np

from ingle.config.policy import Correction, CorrectionLevel
from ingle.objectives.rollouts.advantages import Floats, Integers, sum_answers

#: Largest logarithm of a weight: its square is finite.
_LIMIT = 300.0


def effective_sample_size(log_weights: Floats) -> float:
    """Returns how many equally weighted samples are worth as much as these: ``(sum w)^2 / sum w^2``.

    Source: Kong 1992, "A note on importance sampling using standardized weights".

    Args:
        log_weights: Logarithms of the weights; a common factor changes nothing.
    """
    if not len(log_weights):
        return 0.0
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def correction_weights(
    log_ratios_N: Floats, lengths_R: Integers, how: Correction, level: CorrectionLevel, threshold: float
) -> Floats:
    """Computes the factor on the policy loss of each token.

    Args:
        log_ratios_N: Log-probability of each token under the trained policy, less that under the sampler.
        lengths_R: Tokens of each answer.
        how: ``none``: 1 everywhere. ``truncate``: the ratio, at most ``threshold``. ``mask``: the ratio, 0 above it.
        level: ``token``: the ratio of the token. ``sequence``: the product over its answer. Without a bound, only the
            product makes the gradient right; but it leaves 1 quickly in long answers.
        threshold: Largest ratio.

    Returns:
        [N].

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncation);
    Liu et al. 2025, "When speed kills stability" (masking of answers).
    """
    if how == "none":
        return np.ones(len(log_ratios_N))
    if level == "sequence":
        log_ratios_N = np.repeat(sum_answers(log_ratios_N, lengths_R), lengths_R)
    weights_N = np.exp(log_ratios_N.clip(-_LIMIT, _LIMIT))
    return np.minimum(weights_N, threshold) if how == "truncate" else np.where(weights_N > threshold, 0.0, weights_N)
