"""Whatever a reward function does costs an answer its score, and never the run."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ingle.config.rewards import FunctionReward, ModelReward, NumberReward
from ingle.errors import RewardError
from ingle.rewards import Group, RewardPool, Scores, check_failed, digest

HOSTILE = str(Path(__file__).with_name("hostile.py"))


def function(name: str, **options: object) -> FunctionReward:
    return FunctionReward(path=HOSTILE, function=name, **options)  # type: ignore[arg-type]


def score(texts: list[str], *rewards: FunctionReward) -> Scores:
    with RewardPool(rewards) as pool:
        return pool.score(Group("q", texts, [[1]] * len(texts)))


def ends(scores: Scores, column: int = 0) -> list[str]:
    return [row[column] for row in scores.statuses]


def test_each_answer_has_a_status_of_its_own() -> None:
    expected = {
        "ab": "ok",
        "raise": "error",
        "exit": "error",
        "nan": "invalid",
        "huge": "error",
        "text": "invalid",
        "object": "invalid",
        "none": "none",
        "true": "ok",
        "threads": "ok",
        "fork": "ok",
        "abcd": "ok",
    }
    texts = list(expected)
    scores = score(texts, function("one"), function("many"))
    values = [{"ab": 2.0, "true": 1.0, "threads": 7.0, "fork": 4.0, "abcd": 4.0}.get(text, math.nan) for text in texts]
    for column in (0, 1):  # one by one, and all answers in one call
        assert ends(scores, column) == list(expected.values())
        np.testing.assert_equal(scores.values[:, column], values)
    assert "no such answer" in scores.errors[1, 0] and "hostile.py:" in scores.errors[1, 0]


def test_an_answer_that_ends_the_process_costs_only_itself() -> None:
    scores = score(["a", "segfault", "leave", "ccc", "close", "write"], function("one"))
    assert ends(scores) == ["ok", "crashed", "crashed", "ok", "crashed", "crashed"]
    np.testing.assert_equal(scores.values[:, 0], [1, math.nan, math.nan, 3, math.nan, math.nan])
    assert "SIGSEGV" in scores.errors[1, 0] and "exit status 0" in scores.errors[2, 0]


def test_an_answer_that_ends_the_process_is_found_among_others() -> None:
    scores = score(["a", "bb", "segfault", "ccc"], function("many"))
    np.testing.assert_equal(scores.values[:, 0], [1, 2, math.nan, 3])
    assert ends(scores) == ["ok", "ok", "crashed", "ok"]


@pytest.mark.parametrize("text", ["hang", "print", pytest.param("stubborn", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", ["one", "many"])
def test_an_answer_that_takes_too_long_is_given_up(text: str, name: str) -> None:
    scores = score(["a", text], function(name, time_limit_s=0.2))
    assert ends(scores) == ["ok", "timeout"]
    assert len(scores.printed) <= 20 and all(len(line) <= 300 for line in scores.printed)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="only Linux limits the memory of a process")
def test_memory_is_limited() -> None:
    scores = score(["a", "memory"], function("one", memory_mb=256))
    assert ends(scores) == ["ok", "error"] and "MemoryError" in scores.errors[1, 0]


def test_a_wrong_number_of_scores_is_no_score() -> None:
    scores = score(["long", "short"], function("wrong_length"))
    assert ends(scores) == ["ok", "invalid"] and "0 scores for 1 answers" in scores.errors[1, 0]


def test_functions_may_be_asynchronous_or_lazy_and_groups_overlap() -> None:
    rewards = [function("later"), function("lazily"), NumberReward(kind="number"), function("graded")]
    with RewardPool(rewards, num_workers=2) as pool:
        assert pool.names == ("later", "lazily", "number", "graded")
        groups = [Group("q", ["x" * size, "7"], [[1], [2]], {"answer": "7"}) for size in range(1, 6)]
        waiting = [pool.submit(group) for group in groups]
        for size, outcome in enumerate(waiting, 1):
            found = outcome.take()
            np.testing.assert_equal(found.values, [[size, size, 0, 1], [1, 1, 1, 1]])
            assert found.metrics == {"right": 0.5}, "numbers that are logged for each answer have a mean"


def test_a_trained_reward_model_is_left_to_the_caller() -> None:
    with RewardPool([ModelReward(kind="model", path="runs/reward")]) as pool:
        assert np.isnan(pool.score(Group("q", ["a"], [[1]])).values).all()


def test_a_function_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    two = tmp_path / "two.py"
    two.write_text("def a(completions, **kwargs): ...\ndef b(completions, **kwargs): ...\n")
    odd = tmp_path / "odd.py"
    odd.write_text("def reward(x, y): ...\n")
    dead = tmp_path / "dead.py"
    dead.write_text("import os\nos.abort()\n")
    for path, words in [
        (broken, "no_such_module"),
        (two, "a, b"),
        (odd, "x, y"),
        (dead, "SIGABRT"),
        (tmp_path / "missing.py", "missing.py"),
        ("no_such_package.rewards", "no_such_package"),
    ]:
        with pytest.raises(RewardError, match=words), RewardPool([FunctionReward(path=str(path))]):
            pass


def test_leaving_the_pool_ends_a_function_at_once() -> None:
    began = time.monotonic()
    with RewardPool([function("one", time_limit_s=60)]) as pool:
        pool.submit(Group("q", ["hang"], [[1]]))
    assert time.monotonic() - began < 10


def test_too_many_failures_end_the_run() -> None:
    scores = score(["a", "raise", "b", "c"], function("one"))
    assert "1 of 4 answers (1 error; the first: " in check_failed([scores], ["one"], 0.25)["one"]
    with pytest.raises(RewardError, match="1 of 4 answers") as caught:
        check_failed([scores], ["one"], 0.2)
    assert "no such answer" in str(caught.value)


def test_the_digest_follows_the_file(tmp_path: Path) -> None:
    file = tmp_path / "f.py"
    file.write_text("def reward(completions): ...\n")
    before = digest([FunctionReward(path=str(file))])
    file.write_text("def reward(completions): return []\n")
    assert digest([FunctionReward(path=str(file))]) != before
