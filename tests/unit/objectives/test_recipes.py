"""What objectives make of sampled answers: which they learn from, and what these weigh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from ingle.config.objective import ObjectiveConfig
from ingle.objectives.rollouts.buffer import SampleBuffer
from ingle.objectives.rollouts.recipes import BestAndWorst, BestOfN, Policy

LENGTHS = np.array([2, 1, 3, 1, 2, 2])
NAN = float("nan")


def objective(kind: str, **options: Any) -> Any:
    given = {"kind": kind, "rewards": ["r.py"], "num_generations": 3, "num_prompts": 2, **options}
    return TypeAdapter(ObjectiveConfig).validate_python(given)


def answers(rewards: list[float], **columns: Any) -> SampleBuffer:
    """Returns two groups of three answers with rewards."""
    total = LENGTHS.sum()
    buffer = SampleBuffer(
        {
            "prompt_ids": np.zeros(6, np.int32),
            "prompt_lengths": np.ones(6, np.int64),
            "ids": np.arange(total, dtype=np.int32),
            "lengths": LENGTHS,
            "draws": np.repeat([4, 5], 3),
            "answers": np.tile([0, 1, 2], 2),
            "rows": np.zeros(6, np.int64),
        }
    )
    scored = np.repeat(~np.isnan(rewards), LENGTHS)
    zeros = np.zeros(total)
    given = {"rewards": rewards, "counted": scored, "sampler_logps": zeros, "entropies": zeros, "old_logps": zeros}
    return buffer.adding(**given | columns)


def policy(kind: str = "grpo", **options: Any) -> Policy:
    return Policy(objective(kind, **options), np.ones(1))


def test_the_best_answer_is_the_first_of_equals() -> None:
    chosen = BestOfN(objective("raft"), np.ones(1)).select(answers([0, 1, 1, NAN, -1, NAN]))
    assert chosen["answers"].tolist() == [1, 1] and chosen["rewards"].tolist() == [1, -1]


def test_a_pair_is_the_best_and_the_worst_with_a_reward() -> None:
    recipe = BestAndWorst(objective("online_dpo"), np.ones(1))
    chosen = recipe.select(answers([0.5, NAN, 2, NAN, 1, NAN]))
    assert chosen["answers"].tolist()[:2] == [2, 0] and chosen["scores"].tolist()[:2] == [2, 0.5]
    assert chosen["scores"].tolist()[2:] == [0, 0], "one reward makes no pair"
    assert recipe.weigh(chosen, 0.5)[1]["ties"] == 0.5


def test_a_divergence_in_the_reward_is_subtracted_from_whole_answers() -> None:
    reference = np.array([-0.5, -0.5, -1, 0, 0, -3, 0, 0, 0, 0, 0.0])
    kl = {"place": "reward", "estimator": "k1", "coef": 0.1}
    buffer = answers([1, 1, 1, 0, 0, 3], reference_logps=reference)
    weighed, figures = policy(advantage="group_mean", kl=kl).weigh(buffer, 0.5)
    net = np.array([1 - 0.1, 1 - 0.1, 1 - 0.3])
    expected = np.repeat([*(net - net.mean()), -1, -1, 2], LENGTHS)
    np.testing.assert_allclose(weighed["advantages"], expected, atol=1e-6)
    assert figures["kl"] == pytest.approx((1 + 1 + 3) / 6) and figures["kl_coef"] == 0.1


def test_the_reward_of_ppo_is_at_the_last_token_and_its_divergence_at_each() -> None:
    reference = -np.ones(LENGTHS.sum())
    options = {"num_generations": 3, "whiten": False, "gae_lambda": 1.0, "kl": {"coef": 0.5}}
    buffer = answers([1, 2, 3, 4, 5, 6], reference_logps=reference, values=np.zeros(LENGTHS.sum()))
    weighed, _ = policy("ppo", **options).weigh(buffer, 0.5)
    assert weighed["returns"].tolist()[:3] == [1 - 1.0, 1 - 0.5, 2 - 0.5]  # k1 is 1 nat at each token


def test_an_answer_without_a_reward_weighs_nothing() -> None:
    weighed, _ = policy(advantage="leave_one_out", kl={"place": "none"}).weigh(answers([NAN, 1, 0, 2, 2, 2]), 0.5)
    assert weighed["weights"][:2].tolist() == [0, 0] and not weighed["advantages"][:2].any()
    assert weighed["advantages"][2] == 1 and not weighed["advantages"][6:].any(), "equal rewards teach nothing"


def test_unfinished_answers_are_settled_before_they_are_compared() -> None:
    recipe = policy(unfinished="replace", unfinished_value=-2.0)
    scores, finished = np.array([[1.0], [2], [3], [4], [5], [6]]), np.array([True, False, True, True, True, False])
    buffer, raw = recipe.reward(answers([0] * 6), scores, finished)
    assert buffer["rewards"].tolist() == [1, -2, 3, 4, 5, -2] and raw.tolist() == [1, 2, 3, 4, 5, 6]
    masked, _ = policy(unfinished="mask").reward(answers([0] * 6), scores, finished)
    assert masked["counted"].tolist() == [*[True] * 2, False, *[True] * 6, False, False]


def test_prompts_teach_by_unequal_rewards_of_answers_that_count() -> None:
    recipe = policy(preset="dapo")
    assert recipe.teaches(answers([1, 1, 1, 0, 1, NAN])).tolist() == [False] * 3 + [True] * 3
    finished = np.array([False, False, False, False, True, True])
    masked, _ = recipe.reward(answers([0] * 6), np.array([[0.0, 1, 0, 0, 1, 0]]).T, finished)
    assert recipe.teaches(masked).tolist() == [False] * 3 + [True] * 3, "nothing of the first prompt is learned from"


def test_the_moving_baseline_and_the_weight_of_the_divergence_are_part_of_the_state() -> None:
    kl = {"place": "reward", "coef": 0.2, "control": "adaptive", "target": 0.1, "horizon": 10.0}
    first, second = (policy("reinforce", kl=kl) for _ in range(2))
    buffer = answers([1, 2, 3, 4, 5, 6], reference_logps=-np.ones(LENGTHS.sum()))
    first.weigh(buffer, 0.1)
    assert first.control.coef > 0.2
    second.load_state_dict(first.state_dict())
    (one, figures), (other, same) = first.weigh(buffer, 0.2), second.weigh(buffer, 0.2)
    np.testing.assert_array_equal(one["advantages"], other["advantages"])
    assert figures == same
