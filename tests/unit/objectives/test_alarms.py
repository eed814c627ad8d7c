"""Alarms on invented figures, and in a world in which the reward is known to be wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ingle.config.policy import AlarmConfig
from ingle.objectives.rollouts.alarms import PATIENCE, Alarms, describe_answers, mean_figures

START = {
    "response_tokens": 20.0,
    "repetition": 0.1,
    "identical": 0.2,
    "entropy": 2.0,
    "kl": 0.0,
    "kl_stderr": 0.1,
    "sampler_ess": 1.0,
    "sampler_deviation": 0.0,
    "zero_spread": 0.0,
}


def names(alarms: Alarms, first: int, count: int, **changes: float) -> list[str]:
    """The alarms of ``count`` iterations with the same figures."""
    figures = START | changes
    return [alarm.name for at in range(first, first + count) for alarm in alarms.update(at, figures)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("length", {"response_tokens": 31.0}),
        ("length", {"length_correlation": 0.7, "length_correlation_low": 0.55, "length_correlation_high": 0.8}),
        ("length", {"length_correlation": -0.7, "length_correlation_low": -0.8, "length_correlation_high": -0.55}),
        ("repetition", {"repetition": 0.31}),
        ("repetition", {"identical": 0.6}),
        ("entropy", {"entropy": 0.19}),
        ("kl", {"kl": 8.3}),
        ("mismatch", {"sampler_ess": 0.4}),
        ("mismatch", {"sampler_deviation": 0.2}),
        ("idle", {"zero_spread": 0.9}),
    ],
)
def test_a_sign_that_lasts_raises_its_alarm_once(name: str, changes: dict[str, float]) -> None:
    alarms = Alarms(AlarmConfig(), kl_limit=8.0)
    assert names(alarms, 0, 4) == []
    assert names(alarms, 4, PATIENCE - 1, **changes) == [] and alarms.is_quiet == (name != "kl")
    assert names(alarms, 6, 1) == [] and alarms.is_quiet  # it went away
    assert names(alarms, 7, 6, **changes) == [name]
    off = Alarms(AlarmConfig.model_validate({name: "off"}), kl_limit=8.0)
    assert names(off, 0, 1) + names(off, 1, 6, **changes) == []


def test_an_alarm_says_what_since_when_and_what_to_do() -> None:
    alarms = Alarms(AlarmConfig(), kl_limit=8.0)
    names(alarms, 0, 1)
    (alarm,) = [alarm for at in range(1, 4) for alarm in alarms.update(at, START | {"kl": 9.0})]
    assert alarm.stops and alarm.since == 1
    assert alarm.message == (
        "The divergence from the reference is 9.0 nats per answer; the limit is 8.0, since iteration 2."
    )
    assert "--objective.kl.coef" in alarm.fix


def test_the_state_survives_a_checkpoint() -> None:
    whole, before = (Alarms(AlarmConfig(), proxies=["gold"]) for _ in range(2))
    rng = np.random.default_rng(0)

    def figures(at: int) -> dict[str, float]:
        gold = -0.02 * max(0, at - 20) + 0.001 * rng.standard_normal()
        own = {"reward": 0.1 * at, "reward_stderr": 0.01, "rewards/gold": gold, "rewards/gold_stderr": 0.01}
        return START | own | {"entropy": 2.0 / (at + 1)}

    points = [figures(at) for at in range(40)]
    expected = [alarm for at, point in enumerate(points) for alarm in whole.update(at, point)]
    found = [alarm for at, point in enumerate(points[:22]) for alarm in before.update(at, point)]
    after = Alarms(AlarmConfig(), proxies=["gold"])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    found += [alarm for at, point in enumerate(points[22:], 22) for alarm in after.update(at, point)]
    assert found == expected and {alarm.name for alarm in found} == {"entropy", "proxy"}


def test_a_proxy_that_falls_at_once_is_noticed() -> None:
    alarms, found = Alarms(AlarmConfig(), proxies=["gold"]), []
    for at in range(9):
        own = {"reward": min(1.0, 0.2 * at), "reward_stderr": 0.03}
        found += alarms.update(at, own | {"rewards/gold": max(0.0, 0.5 - 0.1 * at), "rewards/gold_stderr": 0.03})
    assert [alarm.name for alarm in found] == ["proxy"]


def test_figures_of_answers() -> None:
    texts = [[1, 2, 3, 4, 5, 6, 7], [5] * 7, [1, 2, 3], [1, 2, 3], [1, 2, 3], [9, 2, 3]]
    ids: list[Any] = [np.array(text, np.int32) for text in texts]
    groups = np.array([0, 0, 1, 1, 1, 1])
    figures = describe_answers(ids, np.full(6, np.nan), groups)
    # 4-grams: none of 4 repeats, 3 of 4 do, no other answer has one.
    assert figures == {"repetition": 0.75 / 6, "identical": (1 / 2 + 3 / 4) / 2}
    assert mean_figures("x", np.array([0, 2, 1, 1, np.nan, 4.0]), groups) == {"x": 1.6, "x_stderr": 0.5}


def test_the_correlation_of_reward_and_length_is_that_within_prompts() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 4)
    lengths = 20 + 10 * (groups % 2) + rng.integers(0, 8, 200)
    between = (groups % 2) + 0.01 * rng.standard_normal(200)  # long prompts are easy, long answers are not better
    within = lengths + rng.standard_normal(200)
    ids: list[Any] = [np.arange(length) for length in lengths]
    assert abs(describe_answers(ids, between, groups)["length_correlation"]) < 0.2
    found = describe_answers(ids, within, groups)
    assert found["length_correlation_low"] < found["length_correlation"] < found["length_correlation_high"]
    assert found["length_correlation_low"] > 0.5


class World:
    """Answers are numbers x with features (x, x^2); a reward model is fitted to noisy preferences near x = 0.

    The true reward has its best answer at 1.5. The fitted one is right where answers were compared, and goes on rising
    beyond. A Gaussian policy climbs it.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        x, y = self.rng.normal(0, 0.5, (2, 4000))
        wins = self.rng.random(4000) < 1 / (1 + np.exp(self.gold(y) - self.gold(x)))
        difference = np.where(wins, x - y, y - x)
        slope = 0.0
        for _ in range(30):  # Newton's method for the Bradley-Terry likelihood of a linear reward
            p = 1 / (1 + np.exp(-slope * difference))
            slope += ((1 - p) * difference).sum() / (p * (1 - p) * difference**2).sum()
        self.slope, self.mean = slope, 0.0

    @staticmethod
    def gold(x: Any) -> Any:
        return x - x**2 / 3

    def iterate(self, num_prompts: int = 32, num_generations: int = 4) -> dict[str, float]:
        groups = np.repeat(np.arange(num_prompts), num_generations)
        easy = self.rng.normal(0, 0.3, num_prompts)[groups]
        x = self.rng.normal(self.mean, 0.5, len(groups))
        reward = self.slope * x
        self.mean += 0.05 * float(((reward - reward.mean()) * (x - self.mean)).mean()) / 0.25
        return mean_figures("reward", reward + easy, groups) | mean_figures("rewards/gold", self.gold(x) + easy, groups)


@pytest.mark.parametrize("seed", range(5))
def test_the_proxy_alarm_comes_after_the_turn_of_the_true_reward_and_not_before(seed: int) -> None:
    world, alarms = World(seed), Alarms(AlarmConfig(), proxies=["gold"])
    means, raised = [], None
    for at in range(150):
        means.append(world.mean)
        if alarms.update(at, world.iterate()):
            raised = at
            break
    turn = int(np.argmax([World.gold(mean) for mean in means]))
    assert raised is not None and turn < raised < turn + 40
    assert World.gold(means[turn]) - World.gold(means[raised]) < 0.5  # before all is lost again


@pytest.mark.parametrize("seed", range(5))
def test_no_proxy_alarm_while_the_proxy_only_varies(seed: int) -> None:
    rng, alarms = np.random.default_rng(seed), Alarms(AlarmConfig(), proxies=["gold"])
    groups = np.repeat(np.arange(16), 4)
    for at in range(400):
        figures = mean_figures("reward", at / 100 + rng.standard_normal(64), groups)
        figures |= mean_figures("rewards/gold", rng.standard_normal(64), groups)
        assert alarms.update(at, figures) == []
