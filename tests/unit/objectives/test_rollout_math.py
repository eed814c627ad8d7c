"""Advantages, rewards, importance weights and the control of divergence: published values, and what must not happen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ingle.config.policy import Advantage
from ingle.objectives.policy_losses import Clip, Rows, aggregate, divergence, kl_terms, log_ratios, policy_losses
from ingle.objectives.rollouts.advantages import (
    MovingMean,
    explained_variance,
    gae,
    group_advantages,
    has_spread,
    normalize_then_sum,
    top_entropy,
    whiten,
)
from ingle.objectives.rollouts.importance import correction_weights, effective_sample_size
from ingle.objectives.rollouts.kl_control import KlControl
from ingle.objectives.rollouts.rewards import RunningScale, settle_unfinished, sum_rewards, token_rewards

NONE = float("nan")


def near(*values: float, tolerance: float = 1e-8) -> Any:
    return pytest.approx(np.array(values), abs=tolerance)


def test_gae_and_whitening() -> None:
    rewards, values = np.array([-0.1, 0.05, 0.0, 1.0]), np.array([0.5, 0.4, 0.6, 0.8])
    advantages, returns = gae(rewards, values, np.array([4]), 1.0, 0.95)
    assert advantages == near(0.389475, 0.6205, 0.39, 0.2)
    assert returns == near(0.889475, 1.0205, 0.99, 1.0)
    both = np.append(advantages, [-0.5, 0.1])
    white = whiten(both, np.ones(6, bool))
    assert white == near(0.48961807, 1.08659143, 0.49097468, 0.00001077, -1.80880366, -0.25839129)
    assert whiten(both, np.ones(6, bool), shift=False) == pytest.approx(white + both.mean())
    assert explained_variance(values, values, np.ones(4, bool)) == 1.0


def test_answers_of_any_length_have_the_estimates_that_they_have_alone() -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([3, 0, 5, 1])
    rewards, values, chosen = rng.normal(size=9), rng.normal(size=9), rng.random(9) < 0.7
    together = gae(rewards, values, lengths, 0.9, 0.8, chosen)
    for first, last in ((0, 3), (3, 8), (8, 9)):
        part = slice(first, last)
        alone = gae(rewards[part], values[part], np.array([last - first]), 0.9, 0.8, chosen[part])
        assert np.array_equal(together[0][part], alone[0]) and np.array_equal(together[1][part], alone[1])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group_std", (-0.86577548, 1.44295913, -0.28859183, -0.28859183)),
        ("group_mean", (-0.3, 0.5, -0.1, -0.1)),
        ("leave_one_out", (-0.4, 0.66666667, -0.13333333, -0.13333333)),
        ("length_weighted", (-0.325, 0.475, -0.125, -0.125)),
    ],
)
def test_group_advantages(kind: Advantage, expected: tuple[float, ...]) -> None:
    rewards, lengths = np.array([0.2, 1.0, 0.4, 0.4]), np.array([2, 4, 2, 8])
    assert group_advantages(rewards, np.zeros(4, int), lengths, kind) == near(*expected)
    # Other groups, their order and answers without a reward change nothing.
    more = np.array([0.2, 5.0, 1.0, NONE, 0.4, 0.4, -2.0])
    groups, longer = np.array([7, 3, 7, 7, 7, 7, 3]), np.array([2, 9, 4, 50, 2, 8, 9])
    found = group_advantages(more, groups, longer, kind)
    assert found[[0, 2, 4, 5]] == near(*expected)
    assert found[3] == 0.0


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out", "batch_std", "length_weighted"])
def test_groups_that_teach_nothing_have_advantages_of_exactly_zero(kind: Advantage) -> None:
    rewards = np.array([0.1, 0.1, 0.1, 3.0, NONE, NONE, 1.0, 2.0])
    groups = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    found = group_advantages(rewards, groups, np.array([3, 7, 9, 1, 1, 1, 2, 2]), kind)
    assert not found[:6].any() and found[6] == -found[7] != 0
    assert has_spread(rewards, groups).tolist() == [False] * 6 + [True] * 2


def test_baselines_are_subtracted() -> None:
    rewards, groups, lengths = np.array([1.0, NONE, 3.0]), np.array([0, 0, 1]), np.ones(3, int)
    found = group_advantages(rewards, groups, lengths, "greedy", baselines_R=np.array([0.5, 0.5, 4.0]))
    assert found.tolist() == [0.5, 0.0, -1.0]
    moving = MovingMean(0.9)
    assert moving.baselines(rewards)[[0, 2]].tolist() == [3.0, 1.0]  # the mean of the others
    moving.update(rewards)
    moving.update(np.array([4.0, 4.0]))
    other = MovingMean(0.9)
    other.load_state_dict(moving.state_dict())
    assert other.baselines(rewards) == near(2.2, 2.2, 2.2)


def test_scores_are_summed_with_their_weights() -> None:
    scores = np.array([[1.0, 2.0], [NONE, 2.0], [NONE, NONE], [0.0, -1.0]])
    assert sum_rewards(scores, np.array([1.0, 0.5])) == pytest.approx([2.0, 1.0, NONE, -0.5], nan_ok=True)
    # A reward on a scale a thousand times as large counts as much.
    groups, weights = np.zeros(4, int), np.ones(2)
    found = [normalize_then_sum(scores * factors, weights, groups) for factors in ([1, 1], [1, 1000])]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_unfinished_answers() -> None:
    rewards, finished = np.array([0.5, 0.5, NONE]), np.array([True, False, False])
    settled = {how: settle_unfinished(rewards, finished, how) for how in ("score", "add", "replace", "mask")}
    assert {how: each[0][1] for how, each in settled.items()} == {"score": 0.5, "add": -0.5, "replace": -1, "mask": 0.5}
    assert all(each[0][0] == 0.5 and np.isnan(each[0][2]) for each in settled.values())
    assert [each[1].tolist() for each in settled.values()] == [[True, True, False]] * 3 + [[True, False, False]]


def test_the_score_is_at_the_last_chosen_token_or_behind_it() -> None:
    kl, lengths = np.array([0.1, 0.2, 0.3, 0.4, 0.5]), np.array([2, 3])
    chosen = np.array([True, True, True, True, False])
    scores = np.array([1.0, 2.0])
    assert token_rewards(scores, kl, lengths, 0.1, chosen_N=chosen) == near(-0.01, 0.98, -0.03, 1.96, 0)
    after = token_rewards(scores, kl, lengths, 0.1, score_at="after")
    assert after == near(-0.01, -0.02, 1, -0.03, -0.04, -0.05, 2)


def test_rewards_are_scaled_by_the_spread_of_all_so_far() -> None:
    rewards = np.random.default_rng(0).normal(3, 2, 50)
    scale = RunningScale()
    assert scale.scale(np.array([0.5, 0.5])).tolist() == [0.5, 0.5]
    for part in np.split(rewards, 5):
        resumed = RunningScale()
        resumed.load_state_dict(scale.state_dict())
        found, again = scale.scale(part), resumed.scale(part)
        assert np.array_equal(found, again)
    every = np.append([0.5, 0.5], rewards)
    assert found == pytest.approx(rewards[40:] / every.std(ddof=1))
    assert scale.scale(np.array([1e9]))[0] <= 10.0


def test_the_least_certain_tokens() -> None:
    entropies, counted = np.array([5.0, 1.0, 2.0, 3.0, 4.0, 9.0]), np.array([True] * 5 + [False])
    assert top_entropy(entropies, counted, 0.4).tolist() == [True, False, False, False, True, False]
    assert top_entropy(entropies, counted, 1.0).tolist() == counted.tolist()


def test_effective_sample_size_and_corrections() -> None:
    assert effective_sample_size(np.array([0.2, -0.1, 0.4])) == pytest.approx(2.8858279)
    assert effective_sample_size(np.array([1e4, 1e4, -1e4])) == pytest.approx(2.0)
    ratios, lengths = np.log([2.0, 0.5, 3.0, 2.0]), np.array([2, 2])
    find = lambda how, level: correction_weights(ratios, lengths, how, level, 2.5).tolist()  # noqa: E731
    assert find("none", "token") == [1, 1, 1, 1]
    assert find("truncate", "token") == pytest.approx([2, 0.5, 2.5, 2])
    assert find("mask", "token") == pytest.approx([2, 0.5, 0, 2])
    assert find("truncate", "sequence") == pytest.approx([1, 1, 2.5, 2.5])
    assert find("mask", "sequence") == pytest.approx([1, 1, 0, 0])


def test_the_interval_of_the_forecast_contains_the_end() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        control = KlControl("fixed", 0.1)
        for iteration in range(1, 21):
            control.update(2 * iteration / 40 + rng.normal(0, 0.1), 0.1, 64, iteration / 40)
        forecast = control.forecast
        assert forecast is not None
        hits += forecast.low <= 2 + rng.normal(0, 0.1) <= forecast.high
    assert 0.92 <= hits / 400 <= 0.98


def test_a_budget_raises_the_weight_when_it_is_in_danger_and_no_earlier() -> None:
    slow, fast = (KlControl("budget", 0.05, budget=8.0) for _ in range(2))
    for iteration in range(1, 41):
        slow.update(0.02 * iteration, 0.05, 64, iteration / 100)
        fast.update(0.3 * iteration, 0.05, 64, iteration / 100)
    assert slow.coef == 0.05 and slow.is_within and not slow.is_exceeded
    assert fast.coef == 50.0 and fast.is_exceeded and not fast.is_within
    resumed = KlControl("budget", 0.05, budget=8.0)
    resumed.load_state_dict(fast.state_dict())
    for control in (fast, resumed):
        control.update(6.0, 0.05, 64, 0.41)
    assert resumed.coef == fast.coef and resumed.forecast == fast.forecast


def one_answer(count: int) -> Rows:
    return Rows(torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.long), 1)


def test_clips_of_published_ratios() -> None:
    ratios, advantages = torch.tensor([1.4, 1.25, 2 / 3], dtype=torch.float64), torch.tensor([1.0, -1.0, -2.0])
    find = lambda clip: policy_losses(ratios, ratios.log(), advantages.double(), clip)  # noqa: E731
    usual, higher = find(Clip()), find(Clip(high=0.28))
    assert usual.losses.tolist() == pytest.approx([-1.2, 1.25, 1.6])
    assert higher.losses.tolist() == pytest.approx([-1.28, 1.25, 1.6])
    assert usual.low.tolist() == [False, False, True] and usual.high.tolist() == [True, False, False]
    mean = log_ratios(ratios.log(), torch.zeros(3).double(), one_answer(3), "sequence_mean")
    assert mean.exp().tolist() == pytest.approx([1.05272660] * 3)


@pytest.mark.parametrize(
    ("clip", "ratio", "advantage", "binds"),
    [
        (Clip(), 1.21, 1.0, True),
        (Clip(), 1.19, 1.0, False),
        (Clip(), 0.5, 1.0, False),
        (Clip(), 0.79, -1.0, True),
        (Clip(), 0.81, -1.0, False),
        (Clip(), 50.0, -1.0, False),
        (Clip("dual", bound=3.0), 3.01, -1.0, True),
        (Clip("dual", bound=3.0), 2.99, -1.0, False),
        (Clip("two_sided", bound=3.0), 3.01, -1.0, True),
        (Clip("cispo", bound=3.0), 50.0, 1.0, False),
        (Clip("none"), 50.0, 1.0, False),
    ],
)
def test_a_bound_takes_the_gradient_away_on_its_side_only(
    clip: Clip, ratio: float, advantage: float, binds: bool
) -> None:
    logps = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    ratios = log_ratios(logps, torch.zeros(1).double(), one_answer(1), "token")
    terms = policy_losses(logps, ratios, torch.tensor([advantage], dtype=torch.float64), clip)
    (gradient,) = torch.autograd.grad(terms.losses.sum(), logps)
    assert (gradient.item() == 0) == binds
    assert binds or np.sign(gradient.item()) == -np.sign(advantage)
    if clip.kind != "cispo":
        assert bool(terms.low | terms.high) == binds


def test_answers_without_counted_tokens_are_an_exact_zero_and_in_no_count() -> None:
    logps = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    counted = torch.tensor([True, True, False, False, False])
    rows = Rows(counted, torch.tensor([0, 0, 0, 1, 1]), 3)
    assert rows.counts(10) == {"completion_tokens": 2.0, "sequences": 1.0, "slots": 10.0}
    values = torch.where(counted, logps, torch.nan)
    for how in ("tokens", "answers", "answer_sums", "constant"):
        (gradient,) = torch.autograd.grad(aggregate(values, rows, how), logps, retain_graph=True)
        assert gradient[2:].tolist() == [0, 0, 0] and gradient[:2].bool().all()
    nobody = Rows(torch.zeros(5, dtype=torch.bool), rows.documents, 3)
    assert aggregate(logps, nobody, "answers").item() == 0.0
    assert nobody.counts(10)["sequences"] == 0.0


def test_ratios_are_one_to_the_bit_before_the_first_update() -> None:
    logps = torch.randn(7, generator=torch.Generator().manual_seed(0)) * 9
    for importance in ("token", "sequence", "sequence_mean", "none"):
        assert (log_ratios(logps, logps.clone(), one_answer(7), importance).exp() == 1.0).all()


def test_extreme_log_probabilities_stay_finite() -> None:
    logps, far = torch.tensor([-200.0, 0.0]).requires_grad_(), torch.tensor([0.0, -200.0])
    for importance in ("token", "sequence", "sequence_mean"):
        terms = policy_losses(logps, log_ratios(logps, far, one_answer(2), importance), torch.ones(2), Clip("none"))
        (gradient,) = torch.autograd.grad(terms.losses.sum(), logps)
        assert gradient.isfinite().all()
    for estimator in ("k1", "k2", "k3", "k3_corrected"):
        values = kl_terms(logps, far, estimator, far)
        (gradient,) = torch.autograd.grad(values.sum(), logps)
        assert values.isfinite().all() and gradient.isfinite().all()


def test_estimates_and_their_expected_gradients_of_three_tokens() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    logits = p.log().requires_grad_()
    found = {}
    for estimator in ("k1", "k2", "k3", "k3_corrected"):
        values = kl_terms(logits.log_softmax(-1), q.log(), estimator)
        (gradient,) = torch.autograd.grad((p * values).sum(), logits, retain_graph=True)
        found[estimator] = (p * values).sum().item(), gradient.tolist()
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(
        {"k1": 0.18378690, "k2": 0.18167739, "k3": 0.18378690, "k3_corrected": 0.18378690}, abs=1e-8
    )
    assert found["k1"][1] == near(0, 0, 0)
    assert found["k3"][1] == near(0.3, -0.2, -0.1)
    for estimator in ("k2", "k3_corrected"):
        assert found[estimator][1] == near(0.26308, -0.17539, -0.08769, tolerance=1e-5)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.0, 0.36527404), (1.0, 0.39605846), (0.5, 0.09112080), (0.1, 0.03263250), (0.9, 0.03476123), (1e-3, 0.00036487)],
)
def test_divergence_from_a_teacher(beta: float, expected: float) -> None:
    student, teacher = (
        torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64),
        torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64),
    )
    assert divergence(student.log(), teacher.log(), beta).item() == pytest.approx(expected, abs=1e-8)


def test_what_a_teacher_teaches() -> None:
    student = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    probabilities = student.detach().exp()
    for beta in (0.0, 1.0):
        value = divergence(student.log_softmax(-1), teacher.log(), beta)
        (gradient,) = torch.autograd.grad(value, student)
        surprise = student.detach() - teacher.log()
        expected = probabilities * (surprise - value.detach()) if beta else probabilities - teacher
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
