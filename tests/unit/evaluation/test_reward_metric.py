"""The rewards of answers as a metric, compared between two models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ingle.config.evaluate import TaskConfig, suit_task
from ingle.config.objective import Sft
from ingle.config.policy import Grpo
from ingle.config.rules import check
from ingle.errors import ConfigError, RewardError
from ingle.evaluation import evaluate
from ingle.evaluation.run.answer_sources import Answer
from ingle.evaluation.tasks.samples import TaskSample
from ingle.events import Sink

REWARD = """
def reward(prompts, completions, completion_ids, answer, level, finished, **kwargs):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    text = completions[0][0]["content"]
    if text == "?":
        return [None]
    return [(text == answer[0]) * level[0] + len(completion_ids[0]) / 100 - (not finished[0])]
"""


class Fixed:
    """Gives the same answer to every sample."""

    def __init__(self, name: str, answers: Sequence[Answer]) -> None:
        self.name, self._answers = name, answers

    def answers(self, samples: Sequence[TaskSample], task: TaskConfig, sink: Sink) -> Iterable[Answer]:
        return self._answers


@pytest.fixture
def task(tmp_path: Path) -> TaskConfig:
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}], "level": 2}
        for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig.model_validate(
        {
            "sources": str(tmp_path / "rows.jsonl"),
            "metrics": ["reward"],
            "rewards": [str(tmp_path / "reward.py"), {"kind": "exact_match", "weight": 0.5}],
        }
    )


def test_rewards_are_compared_in_pairs(task: TaskConfig) -> None:
    base = Fixed("base", [Answer("no", "stop", (1, 2)), Answer("yes", "length"), Answer("?"), Answer("no")])
    tuned = Fixed("tuned", [Answer("yes", "stop", (1,))] * 4)
    (found,) = evaluate(tuned, [task], base=base)
    metric = found.metrics["reward"]
    # Rewards of the base: 0.02, 2 - 1 + 0.5, 0 (the rule scores what the function leaves out), 0.
    assert metric.base == pytest.approx(1.52 / 4) and metric.tuned == pytest.approx(2.51)
    assert [sample.scores["reward"].tuned for sample in found.samples] == pytest.approx([2.51] * 4)


def test_a_function_that_fails_everywhere_is_an_error(task: TaskConfig, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def reward(completions, nothing, **kwargs): return [0.0]")
    with pytest.raises(RewardError, match="4 of 4 answers"):
        evaluate(Fixed("model", [Answer("yes")] * 4), [task])


def test_the_rewards_of_an_objective_are_its_metric(task: TaskConfig) -> None:
    objective = Grpo.model_validate(
        {"kind": "grpo", "rewards": [{"kind": "number"}, {"kind": "model", "path": "runs/reward"}]}
    )
    plain = task.model_copy(update={"metrics": None, "rewards": ()})
    suited = suit_task(plain, objective)
    assert suited.metrics is not None and suited.metrics[0] == "reward"
    assert [reward.kind for reward in suited.rewards] == ["number"]
    assert "reward" not in (suit_task(plain, Sft()).metrics or ())
    with pytest.raises(ConfigError, match="needs something to add up"):
        check(plain.model_copy(update={"metrics": ("reward",)}))
