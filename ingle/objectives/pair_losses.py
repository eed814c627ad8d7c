"""Losses of pairs of answers and of judged answers: tensors in, tensors out.

Notation: ``c`` and ``r`` are the log-ratios to the reference of the chosen and the rejected answer, summed over their
tokens, in nats; ``d = c - r``. Sums are in the dtype of the inputs.

Legend: P pairs, A answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ingle.config.preferences import Divergence, DpoLoss

PairLossName = Literal[DpoLoss, "simpo", "orpo", "cpo", "cpo_hinge", "cpo_ipo"]

#: Largest exponent: beyond it, a divergence that grows exponentially is flat rather than infinite in float32.
_LARGEST_EXPONENT = 80.0
#: Smallest distance of the mean log-probability of an answer from 0, where its odds are infinite.
_SMALLEST = 1e-7


@dataclass(frozen=True)
class PairOptions:
    """What the losses of pairs read; see :mod:`ingle.config.preferences`.

    Attributes:
        gamma: Margin of ``simpo``.
        alpha: Shape of the reward of ``simpo``; 0 for the plain one.
        kl_weight: Weight of the difference of the divergences (``tdpo2``).
    """

    loss: PairLossName
    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: Divergence = "reverse_kl"
    divergence_alpha: float = 0.5
    penalty: float = 0.0
    temperature: float = 0.05
    gamma: float = 0.0
    alpha: float = 0.0
    kl_weight: float = 0.5


@dataclass(frozen=True)
class Answers:
    """One side of P pairs, or A judged answers.

    Attributes:
        logps: Sum of the log-probabilities of an answer, [P].
        lengths: Its tokens, [P].
        ratios: Sum of ``log p - log p of the reference``, [P]; None without a reference.
        divergence: Sum over its tokens of ``KL(reference || policy)``, [P]; only ``tdpo1`` and ``tdpo2`` read it.
    """

    logps: Tensor
    lengths: Tensor
    ratios: Tensor | None = None
    divergence: Tensor | None = None

    @property
    def mean_logps(self) -> Tensor:
        """The mean log-probability per token, [P]; 0 for an answer without tokens."""
        return self.logps / self.lengths.clamp_min(1)

    @property
    def mean_ratios(self) -> Tensor:
        """The mean log-ratio per token, [P]."""
        return self.log_ratios / self.lengths.clamp_min(1)

    @property
    def log_ratios(self) -> Tensor:
        """The log-ratios of a loss with a reference, [P]."""
        assert self.ratios is not None, "the loss needs a reference"
        return self.ratios


def pair_loss(chosen: Answers, rejected: Answers, options: PairOptions) -> Tensor:
    """Returns the loss of each pair, [P].

    Source: sigmoid: Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with label smoothing Mitchell 2023, "A note on
    DPO with noisy preferences". robust: Ray Chowdhury et al. 2024 (arXiv 2403.00409). hinge: Zhao et al. 2023 (arXiv
    2305.10425). ipo: Azar et al. 2023 (arXiv 2310.12036), equation 17. exo: Ji et al. 2024 (arXiv 2402.00856). nca:
    Chen et al. 2024 (arXiv 2402.05369). bco_pair: Jung et al. 2024 (arXiv 2404.04656). sppo: Wu et al. 2024 (arXiv
    2405.00675). apo: D'Oosterlinck et al. 2024 (arXiv 2408.06266). discopop: Lu et al. 2024 (arXiv 2406.08414).
    sigmoid_norm: Lambert et al. 2024 (arXiv 2411.15124). dpop: Pal et al. 2024 (arXiv 2402.13228). tdpo: Zeng et al.
    2024 (arXiv 2404.11999). simpo: Meng et al. 2024 (arXiv 2405.14734), equation 6; with alpha: AlphaPO (arXiv
    2501.03884). orpo: Hong et al. 2024 (arXiv 2403.07691), equation 7. cpo: Xu et al. 2024 (arXiv 2401.08417).
    """
    if options.loss in ("simpo", "orpo", "cpo", "cpo_hinge", "cpo_ipo"):
        return _without_reference(chosen, rejected, options)
    if options.loss in ("nca", "bco_pair", "sppo", "apo_zero", "apo_down", "dpop"):
        return _of_each_answer(chosen.log_ratios, rejected.log_ratios, options)
    return _of_difference(chosen, rejected, options)


def _of_difference(chosen: Answers, rejected: Answers, options: PairOptions) -> Tensor:
    """Returns losses of the difference of two log-ratios."""
    beta, smoothing = options.beta, options.label_smoothing
    scaled = beta * (_score(chosen.log_ratios, options) - _score(rejected.log_ratios, options))
    match options.loss:
        case "sigmoid":
            return _smoothed(scaled, smoothing)
        case "robust":
            return ((smoothing - 1) * logsigmoid(scaled) + smoothing * logsigmoid(-scaled)) / (1 - 2 * smoothing)
        case "hinge":
            return relu(1 - scaled)
        case "ipo":
            return (chosen.mean_ratios - rejected.mean_ratios - 1 / (2 * beta)) ** 2
        case "ipo_sum":
            return (chosen.log_ratios - rejected.log_ratios - 1 / (2 * beta)) ** 2
        case "exo":
            wins, loses = logsigmoid(scaled), logsigmoid(-scaled)
            return wins.exp() * (wins - math.log1p(-smoothing)) + loses.exp() * (loses - math.log(smoothing))
        case "discopop":
            # The share times e^-scaled is 0 times infinity for a large negative difference, but a sum of logarithms.
            share = logsigmoid(scaled / options.temperature)
            other = torch.sigmoid(-scaled / options.temperature)
            return (share - scaled).exp() - other * logsigmoid(scaled)
        case "sigmoid_norm":
            return _smoothed(beta * (chosen.mean_ratios - rejected.mean_ratios), smoothing)
        case "tdpo1":
            return -logsigmoid(scaled - beta * (_divergence(rejected) - _divergence(chosen)))
        case "tdpo2":
            distance = _divergence(rejected) - _divergence(chosen).detach()
            return -logsigmoid(scaled - beta * options.kl_weight * distance)
    raise AssertionError(options.loss)


def _of_each_answer(c: Tensor, r: Tensor, options: PairOptions) -> Tensor:
    """Returns losses that pin the log-ratio of each answer."""
    beta = options.beta
    match options.loss:
        case "nca":
            return -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r)
        case "bco_pair":
            return -logsigmoid(beta * c) - logsigmoid(-beta * r)
        case "sppo":
            return (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2
        case "apo_zero":
            return torch.sigmoid(-beta * c) + torch.sigmoid(beta * r)
        case "apo_down":
            return torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r))
        case "dpop":
            return -logsigmoid(beta * (c - r - options.penalty * relu(-c)))
    raise AssertionError(options.loss)


def _without_reference(chosen: Answers, rejected: Answers, options: PairOptions) -> Tensor:
    beta, smoothing = options.beta, options.label_smoothing
    difference = chosen.logps - rejected.logps
    match options.loss:
        case "simpo":
            margin = beta * (_shaped(chosen.mean_logps, options) - _shaped(rejected.mean_logps, options))
            return _smoothed(margin - options.gamma, smoothing)
        case "orpo":
            return -beta * logsigmoid(log_odds(chosen.mean_logps) - log_odds(rejected.mean_logps))
        case "cpo":
            return _smoothed(beta * difference, smoothing)
        case "cpo_hinge":
            return relu(1 - beta * difference)
        case "cpo_ipo":
            return (difference - 1 / (2 * beta)) ** 2
    raise AssertionError(options.loss)


def start_value(options: PairOptions) -> float | None:
    """Returns the loss of a pair whose log-ratios are 0; None for a loss without a reference."""
    if options.loss in ("simpo", "orpo", "cpo", "cpo_hinge", "cpo_ipo"):
        return None
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    nothing = Answers(zero, one, zero, zero)
    return float(pair_loss(nothing, nothing, options))


def judged_loss(ratios: Tensor, is_good: Tensor, baselines: Tensor, beta: float, loss: str) -> Tensor:
    """Returns the loss of each judged answer, [A].

    Args:
        ratios: Log-ratios, [A].
        is_good: Whether it is a good answer, bool [A].
        baselines: What ``kto`` compares log-ratios with in nats, and ``bco`` rewards, [A].
        beta: Strength of the reference.
        loss: ``kto``, ``apo_zero`` or ``bco``.

    Source: Ethayarajh et al. 2024, "KTO" (arXiv 2402.01306), equation 8; Jung et al. 2024, "BCO" (arXiv 2404.04656),
    equation 11; D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    sign = is_good.to(ratios.dtype) * 2 - 1
    match loss:
        case "kto":
            return torch.sigmoid(-sign * beta * (ratios - baselines))
        case "apo_zero":
            return torch.sigmoid(-sign * beta * ratios)
        case "bco":
            return -logsigmoid(sign * (beta * ratios - baselines))
    raise AssertionError(loss)


def reward_loss(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """Returns ``-log sigmoid(chosen - rejected - margin)`` of the scores of each pair, [P].

    Source: Ouyang et al. 2022 (arXiv 2203.02155), equation 1; Touvron et al. 2023 (arXiv 2307.09288), equation 2.
    """
    return -logsigmoid(chosen - rejected - margins)


def rewards(answers: Answers, options: PairOptions) -> Tensor:
    """Returns the implicit rewards of answers, detached, [P].

    They are beta times the log-ratio to the reference, whatever the loss makes of it; without a reference, beta times
    what the loss compares. Those of ``orpo``, in which beta is a weight, are mean log-probabilities.
    """
    match options.loss:
        case "simpo":
            value = options.beta * _shaped(answers.mean_logps, options)
        case "orpo":
            value = answers.mean_logps
        case "cpo" | "cpo_hinge" | "cpo_ipo":
            value = options.beta * answers.logps
        case _:
            value = options.beta * answers.log_ratios
    return value.detach()


def log_odds(logps: Tensor) -> Tensor:
    """Returns ``log(p / (1 - p))`` from log p; bounded where p rounds to 1."""
    logps = logps.clamp_max(-_SMALLEST)
    # Where e^x is near 1, 1 - e^x loses all digits, but expm1 does not; far from it, log1p is exact.
    near = logps > -math.log(2.0)
    of_near = torch.log(-torch.expm1(torch.where(near, logps, -1.0)))
    of_far = torch.log1p(-torch.exp(torch.where(near, -1.0, logps)))
    return logps - torch.where(near, of_near, of_far)


def _smoothed(difference: Tensor, smoothing: float) -> Tensor:
    """Returns the cross-entropy of a preference that is wrong at a rate of ``smoothing``."""
    loss = -logsigmoid(difference)
    if smoothing == 0:  # otherwise infinity times 0
        return loss
    return (1 - smoothing) * loss - smoothing * logsigmoid(-difference)


def _shaped(mean_logps: Tensor, options: PairOptions) -> Tensor:
    if options.alpha == 0:
        return mean_logps
    return -torch.expm1((-options.alpha * mean_logps).clamp_max(_LARGEST_EXPONENT)) / options.alpha


def _score(ratios: Tensor, options: PairOptions) -> Tensor:
    """Returns ``f'(e^ratio)`` of the f-divergence, without constants that cancel in a difference.

    Source: Wang et al. 2023, "Beyond reverse KL" (arXiv 2309.16240), table 1.
    """
    match options.divergence:
        case "reverse_kl":
            return ratios
        case "forward_kl":
            return -torch.exp((-ratios).clamp_max(_LARGEST_EXPONENT))
        case "js":
            return logsigmoid(ratios)
        case "alpha":
            order = options.divergence_alpha - 1
            return torch.exp((order * ratios).clamp_max(_LARGEST_EXPONENT)) / order


def _divergence(answers: Answers) -> Tensor:
    assert answers.divergence is not None, "the loss needs divergences of tokens"
    return answers.divergence
