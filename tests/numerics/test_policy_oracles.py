"""Advantages and losses of policies against verl and TRL; ``tests/oracles`` says what they computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ingle.config.policy import Advantage, Aggregation, Importance
from ingle.objectives.policy_losses import (
    DENOMINATORS,
    Clip,
    Rows,
    aggregate,
    divergence,
    kl_terms,
    log_ratios,
    policy_losses,
    value_losses,
)
from ingle.objectives.rollouts.advantages import gae, group_advantages, normalize_then_sum, whiten
from ingle.objectives.rollouts.importance import correction_weights
from ingle.objectives.rollouts.kl_control import KlControl
from ingle.objectives.rollouts.rewards import sum_rewards, token_rewards

GOLDENS = json.loads((Path(__file__).parents[1] / "oracles/policy.json").read_text())
VERL, TRL = GOLDENS["verl"], GOLDENS["trl"]
INPUTS = {name: np.array(values) for name, values in GOLDENS["inputs"].items()}
LENGTHS, GROUPS, SCORES = INPUTS["lengths"], INPUTS["groups"], INPUTS["scores"]
EVERY = np.ones(LENGTHS.sum(), np.bool_)
NO_KL = np.zeros(LENGTHS.sum())
ROWS = Rows(torch.from_numpy(EVERY), torch.from_numpy(np.repeat(np.arange(9), LENGTHS)), 9)


def near(expected: Any) -> Any:
    return pytest.approx(np.array(expected, np.float64), rel=1e-12, abs=1e-12)


def tensor(name: str) -> Tensor:
    return torch.from_numpy(INPUTS[name])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("grpo", "group_std"), ("dr_grpo", "group_mean"), ("rloo", "leave_one_out"), ("opo", "length_weighted")],
)
def test_group_advantages_are_those_of_verl(name: str, kind: Advantage) -> None:
    # verl adds 1e-6 to the standard deviation.
    assert group_advantages(SCORES, GROUPS, LENGTHS, kind, eps=1e-6) == near(VERL[name])


@pytest.mark.parametrize("name", ["gae", "gae_gaps"])
def test_gae_is_that_of_verl_with_the_tokens_of_a_tool_in_between(name: str) -> None:
    chosen = EVERY if name == "gae" else INPUTS["gaps"].astype(bool)
    advantages, returns = gae(INPUTS["rewards"] * chosen, INPUTS["values"], LENGTHS, 0.97, 0.9, chosen)
    # verl divides by the count + 1e-8, which shifts means by 1e-10.
    assert whiten(advantages, chosen) == pytest.approx(np.array(VERL[name][0]), abs=1e-8)
    assert np.where(chosen, returns, 0) == near(VERL[name][1])


def test_reinforce_plus_plus_is_that_of_verl() -> None:
    discounted, _ = gae(INPUTS["rewards"], NO_KL, LENGTHS, 0.9, 1.0)
    assert discounted == near(VERL["reinforce_pp"][1])
    assert whiten(discounted, EVERY) == pytest.approx(np.array(VERL["reinforce_pp"][0]), abs=1e-8)
    above = np.repeat(group_advantages(SCORES, GROUPS, LENGTHS, "group_mean"), LENGTHS)
    assert whiten(above, EVERY) == pytest.approx(np.array(VERL["reinforce_pp_baseline"]), abs=1e-8)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_estimates_are_those_of_verl(estimator: Any) -> None:
    assert kl_terms(tensor("logps"), tensor("reference"), estimator).numpy() == near(VERL[estimator])


def test_the_value_loss_is_that_of_verl() -> None:
    losses, bounded = value_losses(tensor("values"), tensor("old_values"), tensor("returns"), 0.3)
    assert losses.mean().item() == near(VERL["value"][0])
    assert bounded.double().mean().item() == pytest.approx(VERL["value"][1], abs=1e-6)


def test_adaptive_control_is_that_of_verl() -> None:
    control, found = KlControl("adaptive", 0.05, target=6.0, horizon=10_000), []
    for kl, answers in ((9.0, 512), (6.6, 512), (3.0, 512), (5.5, 64)):
        control.update(kl, 0.1, answers, 0.5)
        found.append(control.coef)
    assert found == near(VERL["adaptive"])


_USUAL, _HIGHER = Clip("dual", 0.2, 0.28, 3.0), Clip("ppo", 0.2, 0.28)


@pytest.mark.parametrize(
    ("golden", "advantages", "importance", "clip", "aggregation"),
    [
        (VERL["loss_vanilla"], "advantages", "token", _USUAL, "tokens"),
        (VERL["loss_vanilla_answers"], "row_advantages", "token", _USUAL, "answers"),
        (VERL["loss_vanilla_sums"], "row_advantages", "token", _USUAL, "answer_sums"),
        (VERL["loss_gspo"], "row_advantages", "sequence_mean", _HIGHER, "answers"),
        (TRL["loss_grpo"], "row_advantages", "token", _HIGHER, "answers"),
        (TRL["loss_dapo"], "row_advantages", "token", _HIGHER, "tokens"),
        (TRL["loss_dr_grpo"], "row_advantages", "token", _HIGHER, "constant"),
        (TRL["loss_two_sided"], "row_advantages", "token", Clip("two_sided", 0.2, 0.28, 1.5), "tokens"),
        (TRL["loss_cispo"], "row_advantages", "token", Clip("cispo", bound=1.3), "tokens"),
        (TRL["loss_gspo"], "row_advantages", "sequence_mean", _HIGHER, "answers"),
        (VERL["loss_reinforce"], "row_advantages", "none", Clip("none"), "answer_sums"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_policy_losses_are_those_of_verl_and_trl(
    golden: Any, advantages: str, importance: Importance, clip: Clip, aggregation: Aggregation
) -> None:
    leaf = tensor("logps").clone().requires_grad_()
    ratios = log_ratios(leaf, tensor("old"), ROWS, importance)
    terms = policy_losses(leaf, ratios, tensor(advantages), clip)
    loss = aggregate(terms.losses, ROWS, aggregation) / ROWS.counts(6)[DENOMINATORS[aggregation]]
    (gradient,) = torch.autograd.grad(loss, leaf)
    # verl adds 1e-8 to the length of each answer.
    assert gradient.numpy() == pytest.approx(np.array(golden["gradient"]), rel=2e-8, abs=1e-12)
    if importance != "none":  # verl's REINFORCE has another value and the same gradient
        assert loss.item() == pytest.approx(golden["loss"], rel=2e-8)


def test_divergence_in_the_loss_is_that_of_trl() -> None:
    leaf = tensor("logps").clone().requires_grad_()
    terms = policy_losses(leaf, log_ratios(leaf, tensor("old"), ROWS, "token"), tensor("row_advantages"), _HIGHER)
    penalty = kl_terms(leaf, tensor("reference"), "k3_corrected", tensor("old"))
    loss = aggregate(terms.losses + 0.04 * penalty, ROWS, "answers") / 9
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == near(TRL["loss_grpo_kl"]["loss"])
    assert gradient.numpy() == near(TRL["loss_grpo_kl"]["gradient"])


@pytest.mark.parametrize(("name", "kind"), [("group", "group_std"), ("batch", "batch_std"), ("none", "group_mean")])
def test_advantages_of_several_rewards_are_those_of_trl(name: str, kind: Advantage) -> None:
    scores, weights, groups = np.array(TRL["several"], np.float64), np.array([1.0, 0.5, -2.0]), np.repeat([0, 1], 4)
    # TRL's correction of the standard deviation is in float32.
    expected, of_several = (pytest.approx(np.array(TRL[f"advantages_{which}"]), abs=1e-6) for which in (name, "gdpo"))
    assert group_advantages(sum_rewards(scores, weights), groups, LENGTHS[:8], kind) == expected
    assert normalize_then_sum(scores, weights, groups) == of_several


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_divergence_from_a_teacher_is_that_of_trl(beta: float) -> None:
    student, teacher = (torch.tensor(logits, dtype=torch.float64) for logits in TRL["jsd_logits"])
    student.requires_grad_()
    loss = divergence(student.log_softmax(-1), teacher.log_softmax(-1), beta).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == near(TRL["jsd"][str(beta)]["loss"])
    assert gradient.flatten().numpy() == near(TRL["jsd"][str(beta)]["gradient"])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_weights_are_those_of_verl(level: Any) -> None:
    ratios = INPUTS["logps"] - INPUTS["old"]
    assert correction_weights(ratios, LENGTHS, "truncate", level, 1.5) == near(VERL[f"truncate_{level}"])


def test_the_score_is_at_the_last_token() -> None:
    expected = np.zeros(LENGTHS.sum())
    expected[np.cumsum(LENGTHS) - 1] = SCORES
    assert token_rewards(SCORES, NO_KL, LENGTHS, 0.1) == near(expected)
