"""Functions written for TRL and verl run unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ingle.config.rewards import FunctionReward
from ingle.rewards import Group, RewardPool, Scores

MESSAGES = [{"role": "user", "content": "2 + 2?"}]


def score(tmp_path: Path, code: str, group: Group) -> Scores:
    file = tmp_path / "f.py"
    file.write_text(code)
    with RewardPool([FunctionReward(path=str(file))]) as pool:
        scores = pool.score(group)
    assert not scores.errors, scores.errors
    return scores


def test_trl_functions_get_columns_messages_and_callbacks(tmp_path: Path) -> None:
    code = """
def reward(prompts, completions, completion_ids, solution, trainer_state, log_extra=None, log_metric=None, **kwargs):
    assert prompts[0][0]["content"] == "2 + 2?" and len(prompts) == 2, prompts
    assert set(kwargs) == {"tags", "finished"}, kwargs
    assert trainer_state.global_step == 7
    log_extra("lengths", [len(ids) for ids in completion_ids])
    log_metric("share", 0.25)
    assert {c[0]["role"] for c in completions} == {"assistant"}
    return [1.0 if c[0]["content"] == s else None for c, s in zip(completions, solution)]
"""
    group = Group(
        MESSAGES, ["4", "5"], [[1, 2], [3]], {"solution": "4", "tags": ["a"], "prompt": "x"}, state={"global_step": 7}
    )
    scores = score(tmp_path, code, group)
    np.testing.assert_equal(scores.values, [[1.0], [np.nan]])
    assert scores.statuses == (("ok",), ("none",))
    assert scores.extra == {"lengths": [2, 1]} and scores.metrics == {"share": 0.25, "lengths": 1.5}


def test_trl_functions_get_texts_for_text_prompts_and_only_what_they_name(tmp_path: Path) -> None:
    code = "def length(completions): return [len(text) for text in completions]"
    scores = score(tmp_path, code, Group("Say", ["a", "bcd"], [[1], [2]], {"solution": "4"}))
    np.testing.assert_equal(scores.values[:, 0], [1, 3])


def test_an_object_is_a_function_too(tmp_path: Path) -> None:
    code = """
class Scaled:
    def __init__(self, factor): self.factor = factor
    def __call__(self, completion_ids, **kwargs): return [self.factor * len(ids) for ids in completion_ids]
reward = Scaled(0.5)
"""
    scores = score(tmp_path, code, Group("q", ["a"], [[1, 2, 3]]))
    np.testing.assert_equal(scores.values, [[1.5]])


def test_verl_functions_get_their_columns_and_may_return_a_dict(tmp_path: Path) -> None:
    code = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "openai/gsm8k" and extra_info == {"index": 3}
    right = solution_str == ground_truth
    return {"score": float(right), "acc": right}
def helper(): ...
"""
    columns = {
        "data_source": "openai/gsm8k",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 3},
        "ability": "math",
    }
    scores = score(tmp_path, code, Group(MESSAGES, ["4", "5"], [[1], [2]], columns))
    np.testing.assert_equal(scores.values[:, 0], [1, 0])
    assert scores.extra == {"acc": [True, False]}


def test_a_function_of_one_answer_gets_the_columns_that_it_names(tmp_path: Path) -> None:
    code = "async def reward(prompt, completion, answer): return float(completion in answer) if prompt == 'q' else -1"
    scores = score(tmp_path, code, Group("q", ["a", "x"], [[1], [2]], {"answer": "abc", "other": 1}))
    np.testing.assert_equal(scores.values[:, 0], [1, 0])


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    file = tmp_path / "f.py"
    file.write_text("def reward(completions, solution, **kwargs): return [0.0] * len(completions)")
    with RewardPool([FunctionReward(path=str(file))]) as pool:
        scores = pool.score(Group("q", ["a"], [[1]]))
    assert scores.statuses == (("error",),) and "no column solution" in scores.errors[0, 0]
