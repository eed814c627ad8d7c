"""Advantages: how much better an answer, or a token, was than what was expected of it.

They are computed once per iteration from the answers of all ranks, in float64. So they depend on no micro-batch, no
rank and no device. An answer without a reward has NaN; it is in no mean, and its advantage is 0.

Legend: R answers, N tokens of all answers end to end, F reward functions, G groups (all answers to one prompt).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.config.policy import Advantage

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: Added to a standard deviation of rewards, as in TRL.
SPREAD_EPS = 1e-4
#: Added to a variance.
VARIANCE_EPS = 1e-8
#: Kinds that compare the answers to one prompt.
OF_GROUPS = frozenset[Advantage]({"group_std", "group_mean", "leave_one_out", "batch_std", "length_weighted"})


def sum_answers(values_N: npt.NDArray[np.floating[Any]], lengths_R: Integers) -> Floats:
    """Returns the sum over the tokens of each answer, float64 [R]."""
    answers_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    return np.bincount(answers_N, values_N.astype(np.float64), len(lengths_R)).astype(np.float64)


def gae(
    rewards_N: Floats, values_N: Floats, lengths_R: Integers, gamma: float, lam: float, chosen_N: Mask | None = None
) -> tuple[Floats, Floats]:
    """Computes generalized advantage estimates and the returns that the value function learns.

    ``d_t = r_t + gamma V_{t+1} - V_t``, ``A_t = d_t + gamma lam A_{t+1}``; the value after the end is 0. With values of
    0 and ``lam`` 1, the advantages are the discounted returns.

    Args:
        rewards_N: Reward of each token.
        values_N: Value before each token.
        lengths_R: Tokens of each answer.
        gamma: Discount factor.
        lam: Weight of longer estimates; 0 for one step, 1 for the whole answer.
        chosen_N: Tokens that the policy chose; others, such as a tool's output, are skipped. None for all.

    Returns:
        Advantages, 0 where the policy chose nothing, and returns ``A + V``; [N] each.

    Source: Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation" (arXiv
    1506.02438), equation 16.
    """
    chosen_N = np.ones(len(rewards_N), np.bool_) if chosen_N is None else chosen_N
    advantages_N = np.zeros(len(rewards_N))
    firsts_R = np.cumsum(lengths_R) - lengths_R
    values_R, sums_R = np.zeros(len(lengths_R)), np.zeros(len(lengths_R))  # at the next token that was chosen
    for position in reversed(range(int(lengths_R.max(initial=0)))):
        rows = np.flatnonzero(lengths_R > position)
        rows = rows[chosen_N[firsts_R[rows] + position]]
        tokens = firsts_R[rows] + position
        errors = rewards_N[tokens] + gamma * values_R[rows] - values_N[tokens]
        sums_R[rows] = errors + gamma * lam * sums_R[rows]
        values_R[rows] = values_N[tokens]
        advantages_N[tokens] = sums_R[rows]
    return advantages_N, advantages_N + values_N


def whiten(values_N: Floats, counted_N: Mask, *, shift: bool = True) -> Floats:
    """Scales values to variance 1, and to mean 0 if ``shift``; both over the counted ones, the rest becomes 0."""
    counted = values_N[counted_N]
    if not len(counted):
        return np.zeros_like(values_N)
    mean = counted.mean()
    scaled_N = (values_N - mean) / np.sqrt(_variance(counted) + VARIANCE_EPS)
    return np.where(counted_N, scaled_N if shift else scaled_N + mean, 0.0)


def explained_variance(values_N: Floats, returns_N: Floats, counted_N: Mask) -> float:
    """Returns the share of the variance of the returns that the values explain; NaN if the returns do not vary."""
    variance = _variance(returns_N[counted_N])
    return float(1 - _variance((returns_N - values_N)[counted_N]) / variance) if variance > 0 else float("nan")


def group_advantages(
    rewards_R: Floats,
    groups_R: Integers,
    lengths_R: Integers,
    kind: Advantage,
    *,
    baselines_R: Floats | None = None,
    eps: float = SPREAD_EPS,
) -> Floats:
    """Computes the advantage of each answer over the others to its prompt, or over a baseline.

    - ``group_std``: ``(R - mean) / (s + eps)`` with the standard deviation of the group (GRPO, arXiv 2402.03300).
    - ``group_mean``: ``R - mean`` (Dr. GRPO, arXiv 2503.20783); ``(G - 1) / G`` of the true gradient in expectation.
    - ``leave_one_out``: ``R`` less the mean of the others (RLOO, arXiv 2402.14740), without bias.
    - ``batch_std``: ``(R - mean) / (s + eps)`` with the standard deviation of all rewards (Lite PPO, arXiv 2508.08221).
    - ``length_weighted``: ``R - sum(L R) / sum(L)`` over the group (OPO, arXiv 2505.23585).
    - ``greedy`` and ``moving``: ``R`` less ``baselines_R``: the reward of the most likely answer (ReMax, arXiv
      2310.10505), or :class:`MovingMean`.

    Standard deviations are those of a sample (with Bessel's correction).

    Args:
        rewards_R: Rewards; NaN for an answer without one.
        groups_R: Number of the prompt of each answer, in any order.
        lengths_R: Tokens of each answer.
        kind: As above. ``discounted_whitened`` is :func:`whiten` of :func:`gae` without values.
        baselines_R: What ``greedy`` and ``moving`` subtract.
        eps: Added to the standard deviation.

    Returns:
        [R]; exactly 0 for answers without a reward, for groups of fewer than two of them, and in groups of equal ones.
    """
    scored_R = ~np.isnan(rewards_R)
    if kind not in OF_GROUPS:
        assert kind != "discounted_whitened" and baselines_R is not None, kind
        return np.nan_to_num(rewards_R - baselines_R, nan=0.0)
    numbers_R, counts_R = _groups(groups_R, scored_R)
    usual = numbers_R, scored_R.astype(np.float64)
    # From the smallest reward on, so that equal rewards give exact zeros.
    centred_R = _centred(rewards_R, *usual)
    with np.errstate(divide="ignore", invalid="ignore"):
        match kind:
            case "group_std":
                squares_R = _sums(np.where(scored_R, centred_R, 0) ** 2, numbers_R)
                advantages_R = centred_R / (np.sqrt(squares_R / (counts_R - 1)) + eps)
            case "batch_std":
                advantages_R = centred_R / (np.sqrt(_variance(rewards_R[scored_R])) + eps)
            case "leave_one_out":
                advantages_R = centred_R * counts_R / (counts_R - 1)
            case "length_weighted":
                advantages_R = _centred(rewards_R, numbers_R, scored_R * lengths_R)
            case _:
                advantages_R = centred_R
    return np.where(scored_R & (counts_R > 1), advantages_R, 0.0)


def has_spread(rewards_R: Floats, groups_R: Integers) -> Mask:
    """Returns for each answer whether the rewards of its group differ: only such groups teach something, [R]."""
    scored_R = ~np.isnan(rewards_R)
    numbers_R, _ = _groups(groups_R, scored_R)
    centred_R = _centred(rewards_R, numbers_R, scored_R.astype(np.float64))
    return _sums(np.where(scored_R, np.abs(centred_R), 0), numbers_R) > 0


def normalize_then_sum(scores_RF: Floats, weights_F: Floats, groups_R: Integers, *, eps: float = SPREAD_EPS) -> Floats:
    """Computes advantages of several rewards, each scaled in its group first, so that none drowns the others.

    The weighted sum of ``(score - mean) / (s + eps)`` over the functions, then the same over all answers.

    Returns:
        [R]; 0 where nothing scored.

    Source: GDPO (arXiv 2601.05242).
    """
    lengths_R = np.ones(len(scores_RF), np.int64)
    scaled_RF = np.stack(
        [group_advantages(scores_R, groups_R, lengths_R, "group_std", eps=eps) for scores_R in scores_RF.T], 1
    )
    sums_R = np.where(np.isnan(scores_RF).all(1), np.nan, scaled_RF @ weights_F)
    return group_advantages(sums_R, np.zeros_like(groups_R), lengths_R, "batch_std", eps=eps)


def top_entropy(entropies_N: Floats, counted_N: Mask, share: float) -> Mask:
    """Returns the ``share`` of the counted tokens at which the policy was least sure.

    Source: Wang et al. 2025, "Beyond the 80/20 rule" (arXiv 2506.01939).
    """
    if share >= 1 or not counted_N.any():
        return counted_N
    return counted_N & (entropies_N >= np.quantile(entropies_N[counted_N], 1 - share))


class MovingMean:
    """The baseline of ``moving``: the exponential mean of the rewards of earlier iterations.

    In the first iteration, an answer is compared with the mean of the others. So a baseline never contains the reward
    that it is subtracted from, and adds no bias.

    Args:
        decay: Weight of the past.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._mean: float | None = None

    def baselines(self, rewards_R: Floats) -> Floats:
        """Returns the baseline of each answer, [R]."""
        if self._mean is not None:
            return np.full(len(rewards_R), self._mean)
        count = np.count_nonzero(~np.isnan(rewards_R))
        if count < 2:
            return rewards_R.copy()
        return np.asarray((np.nansum(rewards_R) - rewards_R) / (count - 1), np.float64)

    def update(self, rewards_R: Floats) -> None:
        """Adds the rewards of an iteration."""
        if np.isnan(rewards_R).all():
            return
        mean = float(np.nanmean(rewards_R))
        self._mean = mean if self._mean is None else self._decay * self._mean + (1 - self._decay) * mean

    def state_dict(self) -> dict[str, float | None]:
        """Returns the mean."""
        return {"mean": self._mean}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._mean = state["mean"]


def _variance(values: Floats) -> float:
    """Returns the variance of a sample; 0 for fewer than two values."""
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _groups(groups_R: Integers, scored_R: Mask) -> tuple[Integers, Floats]:
    """Returns the number of each answer's group, counted from 0, and how many answers of the group have a reward."""
    numbers_R = np.unique(groups_R, return_inverse=True)[1].astype(np.int64)
    return numbers_R, _sums(scored_R.astype(np.float64), numbers_R)


def _sums(values_R: Floats, numbers_R: Integers) -> Floats:
    """Returns for each answer the sum over its group."""
    sums_G: Floats = np.bincount(numbers_R, values_R).astype(np.float64)
    return sums_G[numbers_R]


def _centred(rewards_R: Floats, numbers_R: Integers, weights_R: Floats) -> Floats:
    """Returns the distance of each reward from the weighted mean of its group; equal rewards give exact zeros."""
    lowest_G = np.full(numbers_R.max(initial=-1) + 1, np.inf)
    np.fmin.at(lowest_G, numbers_R, rewards_R)
    above_R = rewards_R - lowest_G[numbers_R]
    weighted_R = np.where(weights_R > 0, above_R * weights_R, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(above_R - _sums(weighted_R, numbers_R) / _sums(weights_R, numbers_R), np.float64)
