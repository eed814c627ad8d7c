"""Gradients of the policy losses against exact ones: expectations over all answers of a small world, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ingle.config.policy import Advantage, Aggregation, Importance
from ingle.objectives.policy_losses import (
    Clip,
    aggregate,
    divergence,
    kl_terms,
    log_ratios,
    policy_losses,
    value_losses,
)
from ingle.objectives.rollouts.advantages import gae, group_advantages, sum_answers, whiten
from ingle.objectives.rollouts.importance import correction_weights, effective_sample_size
from ingle.objectives.rollouts.kl_control import KlControl
from ingle.objectives.rollouts.rewards import token_rewards
from tests.exact_world import (
    ANSWERS,
    BEFORE,
    LENGTH,
    LENGTHS,
    REWARDS,
    answer_divergence,
    draws,
    expected_reward,
    gradient,
    logps,
    probabilities,
    relative_error,
    rows_of,
    table,
    values,
)

POLICY, REFERENCE, SAMPLER = table(0.0), table(2.0), table(0.3)
EXACT = gradient(expected_reward, POLICY)
ALL = np.arange(len(ANSWERS))
EVERY_TOKEN = np.ones(len(ANSWERS) * LENGTH, np.bool_)


def policy_gradient(
    answers: np.ndarray,
    weights: Tensor,
    advantages: np.ndarray,
    *,
    importance: Importance = "none",
    clip: Clip = Clip("none"),  # noqa: B008
    aggregation: Aggregation = "answer_sums",
    sampler: Tensor = POLICY,
) -> Tensor:
    """Returns the direction in which the loss moves the policy, if answers have these weights and advantages."""
    rows = rows_of(len(answers))
    old = logps(sampler)[answers].flatten()
    advantages_N = torch.from_numpy(np.repeat(advantages, LENGTH) if advantages.ndim == 1 else advantages.flatten())

    def loss(logits: Tensor) -> Tensor:
        logps_N = logps(logits)[answers].flatten()
        ratios_N = log_ratios(logps_N, old, rows, importance)
        losses_N = policy_losses(logps_N, ratios_N, advantages_N, clip).losses
        return aggregate(losses_N * weights.repeat_interleave(LENGTH), rows, aggregation)

    return -gradient(loss, POLICY)


def group_gradient(kind: Advantage, size: int) -> Tensor:
    """Returns the expected direction over all draws of ``size`` answers."""
    chosen, chances = draws(POLICY, size)
    groups = np.repeat(np.arange(len(chosen)), size)
    answers = chosen.flatten()
    advantages = group_advantages(REWARDS[answers], groups, LENGTHS[np.zeros_like(answers)], kind)
    return policy_gradient(answers, chances.repeat_interleave(size) / size, advantages)


def test_the_world_has_the_enumerated_figures() -> None:
    assert expected_reward(POLICY).item() == pytest.approx(0.1911875541, abs=1e-10)
    assert EXACT.norm().item() == pytest.approx(0.1211074193, abs=1e-10)
    assert EXACT[0].tolist() == pytest.approx([0.0443924959, 0.0002349744, -0.0446274703], abs=1e-10)
    assert answer_divergence(POLICY, REFERENCE).item() == pytest.approx(1.0376345677, abs=1e-10)
    divergent = gradient(lambda logits: answer_divergence(logits, REFERENCE), POLICY)
    assert divergent.norm().item() == pytest.approx(0.5470999187, abs=1e-10)


@pytest.mark.parametrize("baseline", [0.0, 7.0])
@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_reinforce_is_the_gradient_with_any_baseline_and_any_ratio_that_is_one(
    importance: Importance, baseline: float
) -> None:
    found = policy_gradient(ALL, probabilities(POLICY), REWARDS - baseline, importance=importance)
    assert relative_error(found, EXACT) < 1e-12


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.sweep)])
def test_groups(size: int) -> None:
    assert relative_error(group_gradient("leave_one_out", size), EXACT) < 1e-12
    assert relative_error(group_gradient("group_mean", size), EXACT * (size - 1) / size) < 1e-12
    # Answers have one length, so the weights of OPO are equal.
    assert relative_error(group_gradient("length_weighted", size), EXACT * (size - 1) / size) < 1e-12


def test_the_bias_of_scaling_by_the_spread_of_a_pair() -> None:
    found = group_gradient("group_std", 2)
    cosine = float((found * EXACT).sum() / found.norm() / EXACT.norm())
    scale = float((found * EXACT).sum() / (EXACT * EXACT).sum())
    assert cosine == pytest.approx(0.97029, abs=1e-5)
    assert scale == pytest.approx(0.8163, abs=1e-4)


@pytest.mark.parametrize(
    ("lam", "knows_values", "error"), [(0.0, 1, 0), (0.95, 1, 0), (1.0, 1, 0), (1.0, 0, 0), (0.95, 0, 0.05476)]
)
def test_gae_is_exact_with_true_values_or_whole_answers(lam: float, knows_values: int, error: float) -> None:
    rewards_N = token_rewards(REWARDS, np.zeros(81), LENGTHS, 0.0)
    advantages_N, _ = gae(rewards_N, values(POLICY).flatten() * knows_values, LENGTHS, 1.0, lam)
    found = policy_gradient(ALL, probabilities(POLICY), advantages_N.reshape(27, 3))
    assert relative_error(found, EXACT) == pytest.approx(error, abs=1e-5 if error else 1e-12)


def test_the_value_loss_is_least_at_the_true_values() -> None:
    true = torch.from_numpy(values(POLICY)).flatten()
    rewards_N = token_rewards(REWARDS, np.zeros(81), LENGTHS, 0.0)
    returns = torch.from_numpy(gae(rewards_N, np.zeros(81), LENGTHS, 1.0, 1.0)[1])
    prefixes = torch.unique(torch.from_numpy(values(POLICY)), return_inverse=True)[1].flatten()
    leaf = torch.zeros(int(prefixes.max()) + 1, dtype=torch.float64).index_put((prefixes,), true).requires_grad_()
    losses_N, _ = value_losses(leaf[prefixes], true, returns, 0.2)
    (slope,) = torch.autograd.grad((losses_N * probabilities(POLICY).repeat_interleave(LENGTH)).sum(), leaf)
    assert slope.abs().max() < 1e-15


def test_divergence_in_the_reward_is_that_of_answers() -> None:
    own, reference = logps(POLICY).flatten(), logps(REFERENCE).flatten()
    rewards_N = token_rewards(np.zeros(27), kl_terms(own, reference, "k1").numpy(), LENGTHS, 1.0)
    advantages_N, _ = gae(rewards_N, np.zeros(81), LENGTHS, 1.0, 1.0)
    found = policy_gradient(ALL, probabilities(POLICY), advantages_N.reshape(27, 3))
    expected = gradient(lambda logits: answer_divergence(logits, REFERENCE), POLICY)
    assert relative_error(-found, expected) < 1e-12


def test_what_the_estimators_of_divergence_teach_as_losses() -> None:
    weights, reference = probabilities(POLICY), logps(REFERENCE)
    answers = gradient(lambda logits: answer_divergence(logits, REFERENCE), POLICY)

    def full(logits: Tensor) -> Tensor:
        """The divergence of each next token, weighted by how often its prefix occurs now."""
        before = probabilities(POLICY)
        each = divergence(logits.log_softmax(-1), REFERENCE.log_softmax(-1), 1.0)
        return (before[:, None] * each[BEFORE]).sum()

    fixed = gradient(full, POLICY)
    tokens = {
        name: gradient(
            lambda logits, name=name: (weights[:, None] * kl_terms(logps(logits), reference, name)).sum(), POLICY
        )
        for name in ("k1", "k2", "k3", "k3_corrected")
    }
    whole = gradient(lambda logits: (weights * kl_terms(logps(logits).sum(1), reference.sum(1), "k2")).sum(), POLICY)
    assert tokens["k1"].norm() < 1e-12
    assert relative_error(tokens["k2"], fixed) < 1e-12
    assert relative_error(tokens["k3_corrected"], fixed) < 1e-12
    assert relative_error(tokens["k3"], fixed) == pytest.approx(0.38208383, abs=1e-8)
    assert relative_error(tokens["k2"], answers) == pytest.approx(0.23358497, abs=1e-8)
    assert relative_error(whole, answers) < 1e-12


def test_answers_of_another_sampler() -> None:
    weights = probabilities(SAMPLER)
    exact = policy_gradient(ALL, weights, REWARDS, importance="sequence", sampler=SAMPLER)
    tokens = policy_gradient(ALL, weights, REWARDS, importance="token", sampler=SAMPLER)
    assert relative_error(exact, EXACT) < 1e-12
    assert relative_error(tokens, EXACT) == pytest.approx(0.22528, abs=1e-5)


def test_truncation_only_shrinks_weights_and_their_effective_number_is_known() -> None:
    ratios = (logps(POLICY) - logps(SAMPLER)).numpy()
    often = np.rint(probabilities(SAMPLER).numpy() * 200_000).astype(int)  # as many answers as are sampled
    sampled = np.repeat(ratios.sum(1), often)
    assert effective_sample_size(sampled) / len(sampled) == pytest.approx(0.94627576, abs=1e-5)
    for level in ("token", "sequence"):
        plain, cut = (correction_weights(ratios.flatten(), LENGTHS, "truncate", level, most) for most in (np.inf, 1.1))
        assert (cut <= plain).all() and (cut == plain)[plain <= 1.1].all() and cut.max() == 1.1


def test_the_first_pass_of_ppo_is_reinforce_with_whitened_advantages() -> None:
    rewards_N = token_rewards(REWARDS, np.zeros(81), LENGTHS, 0.0)
    plain_N, _ = gae(rewards_N, values(POLICY).flatten(), LENGTHS, 1.0, 0.95)
    white_N = whiten(plain_N, EVERY_TOKEN)
    undone_N = white_N * np.sqrt(plain_N.var(ddof=1) + 1e-8)  # the mean is a baseline
    weights = probabilities(POLICY)
    found = policy_gradient(ALL, weights, undone_N.reshape(27, 3), importance="token", clip=Clip("ppo"))
    assert relative_error(found, EXACT) < 1e-12


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(1, 5))])
def test_a_run_ends_within_its_budget_and_learns(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    control, policy, rows, steps = KlControl("budget", 0.01, budget=1.0), POLICY.clone(), rows_of(64), 80
    lengths = np.full(64, LENGTH)
    for step in range(1, steps + 1):
        answers = torch.multinomial(probabilities(policy), 64, replacement=True, generator=generator).numpy()
        old, initial = (logps(each)[answers].flatten() for each in (policy, POLICY))
        kl_N = kl_terms(old, initial, "k1").numpy()
        returns_N, _ = gae(token_rewards(REWARDS[answers], kl_N, lengths, control.coef), 0 * kl_N, lengths, 1.0, 1.0)
        advantages_N = torch.from_numpy(returns_N - returns_N.mean())

        def loss(logits: Tensor) -> Tensor:
            logps_N = logps(logits)[answers].flatten()  # noqa: B023
            ratios_N = log_ratios(logps_N, old, rows, "token")  # noqa: B023
            return aggregate(policy_losses(logps_N, ratios_N, advantages_N, Clip()).losses, rows, "answer_sums") / 64  # noqa: B023

        policy = policy - gradient(loss, policy)
        each_R = sum_answers(kl_N, lengths)
        control.update(each_R.mean(), each_R.std(ddof=1) / 8, 64, step / steps)
        assert not control.is_exceeded
    assert answer_divergence(policy, POLICY) < 1.0
    assert expected_reward(policy) > expected_reward(POLICY) + 0.4
