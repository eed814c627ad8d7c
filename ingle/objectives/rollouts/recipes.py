"""What each objective makes of sampled answers: which ones it learns from, and what they weigh.

Everything is computed in float64 from the answers of all ranks, once per iteration.

Legend: R answers, N tokens of all answers end to end, F rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ingle.config.policy import Advantage, PolicyConfig, Ppo, Rewarded, SampledConfig
from ingle.config.policy_presets import suit_policy
from ingle.objectives.policy_losses import kl_terms
from ingle.objectives.rollouts.advantages import (
    Floats,
    Mask,
    MovingMean,
    explained_variance,
    gae,
    group_advantages,
    has_spread,
    normalize_then_sum,
    sum_answers,
    top_entropy,
    whiten,
)
from ingle.objectives.rollouts.buffer import SampleBuffer
from ingle.objectives.rollouts.importance import correction_weights, effective_sample_size
from ingle.objectives.rollouts.kl_control import KlControl
from ingle.objectives.rollouts.rewards import RunningScale, settle_unfinished, sum_rewards, token_rewards


class Recipe:
    """What an objective makes of the answers of an iteration: here, it learns from all of them alike (``distill``).

    Args:
        config: The objective.
        weights: Weight of each reward, [F].

    Attributes:
        rows: Answers of a prompt that the update reads.
        reads_reference: Whether it reads those of the reference.
        reads_values: Whether it reads values.
        masks_labels: Whether tokens that do not count have no label; otherwise ``weights`` says which ones count.
    """

    reads_reference = reads_values = False
    masks_labels = True

    def __init__(self, config: SampledConfig, weights: Floats) -> None:
        self.config, self._weights = suit_policy(config), weights
        assert self.config.num_generations is not None
        self.rows = self.config.num_generations

    def reward(self, buffer: SampleBuffer, scores_RF: Floats, finished_R: Mask) -> tuple[SampleBuffer, Floats]:
        """Returns the answers with ``rewards`` and ``counted``, and their rewards before what an end changes, [R]."""
        if not isinstance(self.config, Rewarded):
            return buffer, np.full(len(buffer), np.nan)
        config = self.config
        assert config.unfinished is not None
        raw_R = sum_rewards(scores_RF, self._weights)
        rewards_R = raw_R
        if config.combine == "normalize_then_sum":
            scaled_R = normalize_then_sum(scores_RF, self._weights, buffer["draws"])
            rewards_R = np.where(np.isnan(raw_R), np.nan, scaled_R)
        rewards_R, counted_R = settle_unfinished(rewards_R, finished_R, config.unfinished, config.unfinished_value)
        return buffer.adding(rewards=rewards_R, counted=np.repeat(counted_R, buffer["lengths"])), raw_R

    def teaches(self, buffer: SampleBuffer) -> Mask:
        """Returns whether each answer's group has unequal rewards, and an answer that counts, [R].

        True without rewards.
        """
        if "rewards" not in buffer.columns:
            return np.ones(len(buffer), np.bool_)
        counted_R = sum_answers(buffer["counted"], buffer["lengths"]) > 0
        return has_spread(buffer["rewards"], buffer["draws"]) & np.isin(buffer["draws"], buffer["draws"][counted_R])

    def select(self, buffer: SampleBuffer) -> SampleBuffer:
        """Returns the answers that the update reads."""
        return buffer

    def weigh(self, buffer: SampleBuffer, progress: float) -> tuple[SampleBuffer, dict[str, float]]:
        """Returns the answers with what the update reads, and figures.

        Args:
            buffer: The selected answers, with ``old_logps``, ``reference_logps`` and ``values`` as needed. Without
                ``old_logps``, those of the sampler are the policy's.
            progress: Share of the iterations that are done, this one included.
        """
        return buffer, {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what later iterations depend on, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""


class BestOfN(Recipe):
    """Rejection sampling: the best answer to each prompt; one without a reward counts for nothing."""

    def __init__(self, config: SampledConfig, weights: Floats) -> None:
        super().__init__(config, weights)
        self.rows = 1

    def select(self, buffer: SampleBuffer) -> SampleBuffer:
        """Returns the best answer of each group, the first of equals."""
        return buffer.select(_ranked(buffer)[:, 0])


class BestAndWorst(Recipe):
    """The best and the worst answer to each prompt; with equal rewards they make no pair."""

    def __init__(self, config: SampledConfig, weights: Floats) -> None:
        super().__init__(config, weights)
        self.rows = 2

    def select(self, buffer: SampleBuffer) -> SampleBuffer:
        """Returns the best and the worst answer of each group."""
        chosen = buffer.select(_ranked(buffer)[:, [0, -1]].ravel())
        pair = np.nan_to_num(chosen["rewards"], nan=0.0)
        missing = np.isnan(chosen["rewards"]).reshape(-1, 2).any(1).repeat(2)
        return chosen.adding(scores=np.where(missing, 0.0, pair))

    def weigh(self, buffer: SampleBuffer, progress: float) -> tuple[SampleBuffer, dict[str, float]]:
        """Returns the answers, and the share of pairs without a difference."""
        scores = buffer["scores"].reshape(-1, 2)
        return buffer, {"ties": float((scores[:, 0] == scores[:, 1]).mean())}


def _ranked(buffer: SampleBuffer) -> Any:
    """Returns the numbers of the answers of each group from the best to the worst; those without a reward last."""
    draws = buffer["draws"]
    groups = len(np.unique(draws))
    order = np.lexsort((buffer["answers"], -np.nan_to_num(buffer["rewards"], nan=-np.inf), draws))
    # Within a group, answers without a reward stand between the best and the worst that have one, if there are two.
    ranked = order.reshape(groups, -1)
    unscored = np.isnan(buffer["rewards"])[ranked]
    for row, missing in zip(ranked, unscored, strict=True):
        if missing.any() and (~missing).sum() > 1:
            scored = row[~missing]
            row[:] = np.concatenate([scored[:-1], row[missing], scored[-1:]])
    return ranked


class Policy(Recipe):
    """Policy gradients: advantages from rewards, the divergence from the reference, and values."""

    config: PolicyConfig
    masks_labels = False

    def __init__(self, config: PolicyConfig, weights: Floats) -> None:
        super().__init__(config, weights)
        kl = self.config.kl
        assert kl.coef is not None
        kind = "budget" if kl.budget is not None else kl.control
        self.control = KlControl(kind, kl.coef, target=kl.target, horizon=kl.horizon, budget=kl.budget)
        self._moving, self._scale = MovingMean(), RunningScale()
        self.reads_reference = kl.place != "none"
        self.reads_values = isinstance(self.config, Ppo)

    def weigh(self, buffer: SampleBuffer, progress: float) -> tuple[SampleBuffer, dict[str, float]]:
        """Returns the answers with advantages, returns and weights, and figures."""
        counted_N, lengths_R = buffer["counted"], buffer["lengths"]
        counted_R = sum_answers(counted_N, lengths_R) > 0
        figures = {"kl_coef": self.control.coef} if self.config.kl.place in ("reward", "loss") else {}
        kl_N = self._divergence(buffer)
        if kl_N is not None:
            figures |= self._measure(buffer, progress)
        in_reward = self.config.kl.place == "reward"
        coef = figures["kl_coef"] if in_reward else 0.0
        costs_N = kl_N if kl_N is not None and in_reward else np.zeros(len(counted_N))
        rewards_R = buffer["rewards"]
        if isinstance(self.config, Ppo):
            advantages_N, returns_N = self._estimate(buffer, rewards_R, costs_N, coef)
            buffer = buffer.adding(returns=returns_N)
            figures["explained_variance"] = explained_variance(buffer["values"].astype(float), returns_N, counted_N)
        else:
            advantages_N = self._compare(buffer, rewards_R, costs_N, coef)
        counted_N = top_entropy(buffer["entropies"], counted_N, self.config.top_entropy)
        buffer = buffer.adding(advantages=advantages_N, weights=counted_N)
        figures["advantage_std"] = float(advantages_N[counted_N].std()) if counted_N.any() else 0.0
        log_ratios_N = _old(buffer) - buffer["sampler_logps"]
        if "old_logps" in buffer.columns:
            figures["sampler_ess"] = _sample_share(log_ratios_N, lengths_R, counted_R)
            figures["sampler_deviation"] = float(np.abs(np.expm1(log_ratios_N)).mean())
        rollout = self.config.rollout
        if rollout.correction != "none":
            how, level = rollout.correction, rollout.correction_level
            found = correction_weights(log_ratios_N, lengths_R, how, level, rollout.correction_threshold)
            buffer = buffer.adding(correction_weights=found)
        return buffer, {name: value for name, value in figures.items() if np.isfinite(value)}

    def _divergence(self, buffer: SampleBuffer) -> Floats | None:
        """Returns the estimate of the divergence at each token; None without a reference."""
        if not self.reads_reference:
            return None
        assert self.config.kl.estimator is not None
        old_N, reference_N = torch.from_numpy(_old(buffer)), torch.from_numpy(buffer["reference_logps"]).double()
        found: Floats = kl_terms(old_N, reference_N, self.config.kl.estimator).numpy()
        return found

    def _measure(self, buffer: SampleBuffer, progress: float) -> dict[str, float]:
        """Returns the divergence of whole answers in nats, and lets the weight follow it."""
        k1_N = _old(buffer) - buffer["reference_logps"]
        kl_R = sum_answers(k1_N, buffer["lengths"])
        error = float(kl_R.std(ddof=1) / len(kl_R) ** 0.5) if len(kl_R) > 1 else 0.0
        mean = float(kl_R.mean())
        self.control.update(mean, error, len(kl_R), progress)
        forecast = self.control.forecast
        bounds = {} if forecast is None else {"kl_forecast_low": forecast.low, "kl_forecast_high": forecast.high}
        return {"kl": mean, "kl_stderr": error, **bounds}

    def _estimate(self, buffer: SampleBuffer, rewards_R: Floats, costs_N: Floats, coef: float) -> tuple[Floats, Floats]:
        """Returns advantages and returns of each token by the value function."""
        config, counted_N, lengths_R = self.config, buffer["counted"], buffer["lengths"]
        assert isinstance(config, Ppo)
        if config.scale_rewards == "running":
            rewards_R = self._scale.scale(rewards_R)
        rewards_N = token_rewards(rewards_R, costs_N, lengths_R, coef)
        if config.whiten_rewards:
            rewards_N = whiten(rewards_N, counted_N, shift=False)
        values_N = buffer["values"].astype(np.float64)
        advantages_N, returns_N = gae(rewards_N, values_N, lengths_R, config.gamma, config.gae_lambda)
        return (whiten(advantages_N, counted_N) if config.whiten else advantages_N), returns_N

    def _compare(self, buffer: SampleBuffer, rewards_R: Floats, costs_N: Floats, coef: float) -> Floats:
        """Returns the advantage of each token over other answers, or over earlier iterations."""
        assert not isinstance(self.config, Ppo) and self.config.advantage is not None
        kind: Advantage = self.config.advantage
        lengths_R = buffer["lengths"]
        if kind == "discounted_whitened":
            rewards_N = token_rewards(rewards_R, costs_N, lengths_R, coef)
            returns_N, _ = gae(rewards_N, np.zeros(len(rewards_N)), lengths_R, self.config.gamma, 1.0)
            return whiten(returns_N, buffer["counted"])
        if self.config.combine == "normalize_then_sum":
            return np.repeat(np.nan_to_num(rewards_R, nan=0.0), lengths_R)
        net_R = rewards_R - coef * sum_answers(costs_N, lengths_R)
        baselines_R = self._moving.baselines(net_R)
        self._moving.update(net_R)
        found_R = group_advantages(net_R, buffer["draws"], lengths_R, kind, baselines_R=baselines_R)
        return np.repeat(found_R, lengths_R)

    def state_dict(self) -> dict[str, Any]:
        """Returns the weight of the divergence, the moving mean of rewards and their scale."""
        parts: dict[str, KlControl | MovingMean | RunningScale] = {
            "kl": self.control,
            "moving": self._moving,
            "scale": self._scale,
        }
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.control.load_state_dict(state["kl"])
        self._moving.load_state_dict(state["moving"])
        self._scale.load_state_dict(state["scale"])


def _old(buffer: SampleBuffer) -> Floats:
    """Returns the log-probabilities of the policy before the update, float64 [N]; those of the sampler if it is."""
    name = "old_logps" if "old_logps" in buffer.columns else "sampler_logps"
    return buffer[name].astype(np.float64)


def _sample_share(log_ratios_N: Floats, lengths_R: Any, counted_R: Mask) -> float:
    """Returns the effective sample size of the answers that count, as a share of their number."""
    weights_R = sum_answers(log_ratios_N, lengths_R)[counted_R]
    return effective_sample_size(weights_R) / max(len(weights_R), 1)
