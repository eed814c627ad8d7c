"""A judge on a server of the test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingle.config.rewards import JudgeReward
from ingle.errors import RewardError
from ingle.rewards import Group, RewardPool, Scores
from ingle.rewards.judge import read_grade

Reply = tuple[int, Any]


@contextmanager
def server(reply: Callable[[str], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers the text of a message; yields its address and the requests."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"]} | body)
            status, text = reply(body["messages"][0]["content"])
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", requests
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def judge(url: str, folder: Path, template: str = "{prompt} / {answer} / {hint}", **options: Any) -> JudgeReward:
    (folder / "judge.txt").write_text(template)
    return JudgeReward(kind="judge", url=url, model="m", prompt=str(folder / "judge.txt"), **options)


def score(reward: JudgeReward, texts: list[str], memory: Path | None = None) -> Scores:
    with RewardPool([reward], memory=memory) as pool:
        return pool.score(Group("Q {answer}", texts, [[1]] * len(texts), {"hint": "h"}))


def test_grades_become_rewards_and_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    grades = {"good": "Well done. 10/10", "fair": "I say 5.5", "odd": "no grade"}
    with server(lambda text: (200, grades[text.split(" / ")[1]])) as (url, requests):
        reward = judge(url, tmp_path, api_key_env="MY_KEY")
        scores = score(reward, ["good", "fair", "odd"], tmp_path / "judge.sqlite")
        again = score(reward, ["odd", "good"], tmp_path / "judge.sqlite")
    np.testing.assert_allclose(scores.values[:, 0], [1.0, 0.5, np.nan])
    np.testing.assert_allclose(again.values[:, 0], [np.nan, 1.0])
    assert scores.statuses[2] == ("none",) and len(requests) == 3
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert {request["key"] for request in requests} == {"Bearer secret"}
    assert "Q {answer} / good / h" in {request["messages"][0]["content"] for request in requests}


def test_failed_requests_are_repeated_and_late_ones_given_up(tmp_path: Path) -> None:
    seen: list[str] = []

    def reply(text: str) -> Reply:
        seen.append(text)
        if "late" in text:
            time.sleep(5)
        if "refused" in text:
            return 400, "bad request"
        return (200, "7") if seen.count(text) > 1 else (503, "busy")

    with server(reply) as (url, requests):
        scores = score(judge(url, tmp_path, time_limit_s=1.0), ["a", "late", "refused"])
        assert len([request for request in requests if "refused" in request["messages"][0]["content"]]) == 1
    assert [row[0] for row in scores.statuses] == ["ok", "timeout", "error"]
    assert "400" in scores.errors[2, 0]


def test_two_answers_are_compared_in_both_orders(tmp_path: Path) -> None:
    worth = {"best": 2, "good": 1, "same": 1}

    def reply(text: str) -> Reply:
        first, second = (worth[answer] for answer in text.split(" / "))
        return 200, f"Verdict: {1 if first >= second else 2}"  # prefers the first of equal answers

    with server(reply) as (url, requests):
        reward = judge(url, tmp_path, "{answer_1} / {answer_2}")
        scores = score(reward, ["best", "good", "same", "good"])
    # Against three others each; the preference for a place cancels, and equal texts are a tie without a question.
    np.testing.assert_allclose(scores.values[:, 0], [1, 1 / 3, 1 / 3, 1 / 3])
    assert len(requests) == 6


def test_a_judge_that_cannot_be_asked_is_an_error_at_the_start(tmp_path: Path) -> None:
    for url, template, key, words in [
        ("localhost:8000", "{answer}", None, "not a URL"),
        ("http://h/v1", "{answer}", "NO_SUCH_KEY", "NO_SUCH_KEY"),
        ("http://h/v1", "{question}", None, "does not contain the answer"),
    ]:
        reward = judge(url, tmp_path, template, api_key_env=key)
        with pytest.raises(RewardError, match=words), RewardPool([reward]):
            pass


def test_a_server_that_is_not_there_costs_the_scores(tmp_path: Path) -> None:
    scores = score(judge("http://127.0.0.1:9/v1", tmp_path, retries=0), ["a"])
    assert scores.statuses == (("error",),) and "127.0.0.1:9" in scores.errors[0, 0]


@pytest.mark.parametrize(
    ("text", "grade"),
    [("8/10", 8), ("8 out of 10", 8), ("First 3, then [[9]]", 9), ("10", 10), ("11", None), ("v1.5b", None)],
)
def test_the_grade_is_the_last_number_on_the_scale(text: str, grade: float | None) -> None:
    assert read_grade(text, 1, 10) == (None if grade is None else (grade - 1) / 9)
