"""From the scores of reward functions to the reward of each answer and each token, in float64.

An answer without a reward has NaN.

Legend: R answers, N tokens of all answers end to end, F reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ingle.config.policy import ScoreAt, Unfinished
from ingle.objectives.rollouts.advantages import VARIANCE_EPS, Floats, Integers, Mask


def sum_rewards(scores_RF: Floats, weights_F: Floats) -> Floats:
    """Returns the weighted sum of the scores of each answer, [R].

    A score of NaN is left out, and the weights of the others stay as they are; NaN where nothing scored.
    """
    sums_R = np.nansum(scores_RF * weights_F, axis=1)
    return np.where(np.isnan(scores_RF).all(1), np.nan, sums_R)


def settle_unfinished(rewards_R: Floats, finished_R: Mask, how: Unfinished, value: float = -1.0) -> tuple[Floats, Mask]:
    """Returns the rewards, and which answers count in the loss, when answers without an end are settled.

    Args:
        rewards_R: Rewards; NaN for an answer without one.
        finished_R: Whether the policy ended the answer.
        how: ``score`` leaves the reward; ``add`` adds ``value`` to it (TRL's ``missing_eos_penalty`` 1 is a value of
            -1); ``replace`` replaces it (-1 in arXiv 2403.17031); ``mask`` leaves the answer out of numerators and
            denominators (DAPO, arXiv 2503.14476, section 3.4), but not out of the mean of its group.
        value: See ``how``.
    """
    counted_R = ~np.isnan(rewards_R) & (finished_R | (how != "mask"))
    match how:
        case "add":
            rewards_R = np.where(finished_R, rewards_R, rewards_R + value)
        case "replace":
            rewards_R = np.where(finished_R | np.isnan(rewards_R), rewards_R, value)
    return rewards_R, counted_R


def token_rewards(
    rewards_R: Floats,
    kl_N: Floats,
    lengths_R: Integers,
    coef: float,
    *,
    chosen_N: Mask | None = None,
    score_at: ScoreAt = "last_token",
) -> Floats:
    """Returns the reward of each token: ``-coef * kl``, and the reward of the answer at its end.

    Args:
        rewards_R: Rewards of the answers; NaN counts as 0.
        kl_N: Estimate of the divergence from the reference at each token.
        lengths_R: Tokens of each answer.
        coef: Weight of the divergence, in units of the reward per nat.
        chosen_N: Tokens that the policy chose; the others have no reward. None for all.
        score_at: ``last_token``: the last chosen token. ``after``: a place behind the last token, which then has a
            value of its own (arXiv 2403.17031).

    Returns:
        [N]; [N + R], a place more for each answer, with ``after``.
    """
    chosen_N = np.ones(len(kl_N), np.bool_) if chosen_N is None else chosen_N
    rewards_N = np.where(chosen_N, -coef * kl_N, 0.0)
    scores_R = np.nan_to_num(rewards_R, nan=0.0)
    if score_at == "after":
        return np.insert(rewards_N, np.cumsum(lengths_R), scores_R)
    lasts_R = np.full(len(lengths_R), -1)
    answers_N = np.repeat(np.arange(len(lengths_R)), lengths_R)
    np.maximum.at(lasts_R, answers_N[chosen_N], np.flatnonzero(chosen_N))
    ended_R = lasts_R >= 0
    rewards_N[lasts_R[ended_R]] += scores_R[ended_R]
    return rewards_N


class RunningScale:
    """Divides rewards by the standard deviation of all rewards so far, and clips them.

    Source: Welford 1962; Engstrom et al. 2020, "Implementation matters in deep policy gradients" (arXiv 2005.12729).

    Args:
        limit: Largest absolute value of a scaled reward.
    """

    def __init__(self, limit: float = 10.0) -> None:
        self._limit = limit
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def scale(self, rewards_R: Floats) -> Floats:
        """Adds rewards to the statistics and returns them scaled, [R]; as they are while all were equal."""
        new = rewards_R[~np.isnan(rewards_R)]
        if len(new):
            total = self._count + len(new)
            distance = float(new.mean()) - self._mean
            self._squares += float(((new - new.mean()) ** 2).sum()) + distance**2 * self._count * len(new) / total
            self._mean += distance * len(new) / total
            self._count = total
        variance = self._squares / (self._count - 1) if self._count > 1 else 0.0
        return (
            rewards_R.copy() if variance < VARIANCE_EPS else (rewards_R / variance**0.5).clip(-self._limit, self._limit)
        )

    def state_dict(self) -> dict[str, float]:
        """Returns count, mean and sum of squares."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._count, self._mean, self._squares = int(state["count"]), state["mean"], state["squares"]
