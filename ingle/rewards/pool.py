"""Scores groups of answers in processes of their own, so that no reward function can harm the run."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from ingle.config.rewards import FunctionReward, JudgeReward, ModelReward, RewardConfig, reward_names
from ingle.outcome import Outcome
from ingle.rewards.child import Child, Lost
from ingle.rewards.scores import STATUSES, Group, Scores, Status

#: Printed lines to pass on in a run.
_MAX_LINES = 20
_MAX_LINE_CHARS = 300

#: Score, status and error of an answer.
_Result = tuple[float | None, Status, str]


class RewardPool:
    """Processes that score groups; a context manager.

    The answers to a prompt are always scored together. If a call for several answers fails, it is repeated for halves
    of them, so that only the answers at fault are without a score. A trained reward model is not scored here.

    Args:
        rewards: The rewards.
        num_workers: Processes, each of which scores one group at a time.
        memory: File for the answers of judges, each of which is then asked for once.
    """

    def __init__(self, rewards: Sequence[RewardConfig], *, num_workers: int = 1, memory: Path | None = None) -> None:
        self.rewards = tuple(rewards)
        self.names = reward_names(self.rewards)
        self._called = [at for at, reward in enumerate(self.rewards) if not isinstance(reward, ModelReward)]
        setup = _setup(self.rewards, self._called, memory)
        self._children = [Child(setup) for _ in range(num_workers if self._called else 0)]
        self._tasks: SimpleQueue[tuple[Group, Outcome[Scores]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lines = _MAX_LINES

    def __enter__(self) -> RewardPool:
        """Starts the processes.

        Raises:
            RewardError: A function cannot be loaded.
        """
        loading = []
        for child in self._children:
            loaded: Outcome[None] = Outcome()
            thread = threading.Thread(target=self._serve, args=(child, loaded), name="ingle-rewards", daemon=True)
            thread.start()
            self._threads.append(thread)
            loading.append(loaded)
        try:
            for loaded in loading:
                loaded.take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._children:
            child.close()
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, group: Group) -> Outcome[Scores]:
        """Starts to score a group as soon as a process is free."""
        outcome: Outcome[Scores] = Outcome()
        if self._children:
            self._tasks.put((group, outcome))
        else:
            outcome.set(self._collect(len(group.completions), {}, _Logged(len(group.completions)), []))
        return outcome

    def score(self, group: Group) -> Scores:
        """Scores a group and waits for it."""
        return self.submit(group).take()

    def _serve(self, child: Child, loaded: Outcome[None]) -> None:
        """Lets a process score groups until the pool is closed; one thread per process."""
        try:
            child.start()
            loaded.set(None)
        except BaseException as error:
            loaded.set(None, error)
            return
        while (item := self._tasks.get()) is not None:
            group, outcome = item
            try:
                outcome.set(self._score(child, group))
            except BaseException as error:
                outcome.set(None, error)
        child.stop()

    def _score(self, child: Child, group: Group) -> Scores:
        count = len(group.completions)
        logged = _Logged(count)
        results: dict[int, list[_Result]] = {}
        for function, at in enumerate(self._called):
            results[at] = _Call(child, group, function, self.rewards[at], logged).run(0, count)
        return self._collect(count, results, logged, child.printed())

    def _collect(
        self, count: int, results: Mapping[int, Sequence[_Result]], logged: _Logged, printed: Sequence[str]
    ) -> Scores:
        values = np.full((count, len(self.rewards)), np.nan)
        statuses: list[list[Status]] = [["none"] * len(self.rewards) for _ in range(count)]
        errors: dict[tuple[int, int], str] = {}
        for at, rows in results.items():
            for row, (value, status, error) in enumerate(rows):
                statuses[row][at] = status
                if value is not None:
                    values[row, at] = value
                if error:
                    errors[row, at] = error
        shown = [line[:_MAX_LINE_CHARS] for line in printed[: self._lines]]
        self._lines -= len(shown)
        return Scores(values, tuple(map(tuple, statuses)), errors, logged.extra, logged.means(), tuple(shown))


class _Logged:
    """What the functions logged about a group."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = defaultdict(list)

    def add(self, frame: Mapping[str, Any], first: int, size: int) -> None:
        """Adds what a frame says about the answers from ``first`` on."""
        extra, metrics = frame.get("extra"), frame.get("metrics")
        for name, values in extra.items() if isinstance(extra, dict) else ():
            if isinstance(values, list) and len(values) == size:
                self.extra.setdefault(name, [None] * self.count)[first : first + size] = values
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            if isinstance(value, float) and np.isfinite(value):
                self.metrics[name].append(value)

    def means(self) -> dict[str, float]:
        """Returns the mean of each number that was logged, for the call or for each answer."""
        of_answers = {
            name: [float(value) for value in values if isinstance(value, int | float) and np.isfinite(value)]
            for name, values in self.extra.items()
        }
        return {name: sum(numbers) / len(numbers) for name, numbers in (of_answers | self.metrics).items() if numbers}


class _Call:
    """One function and one group."""

    def __init__(self, child: Child, group: Group, function: int, reward: RewardConfig, logged: _Logged) -> None:
        self._child, self._group, self._function = child, group, function
        self._limit_s, self._logged = reward.time_limit_s, logged
        self._is_divisible = not isinstance(reward, JudgeReward)  # a judge fails for single answers

    def run(self, first: int, last: int) -> list[_Result]:
        """Returns the results of answers ``first`` to ``last``, without ``last``."""
        done: list[_Result] = []
        failure: _Result
        try:
            for frame in self._child.ask(self._request(first, last), self._limit_s):
                if "failed" in frame:
                    failure = _checked([None, *frame["failed"]])
                    if not self._is_per_answer:
                        return self._divide(first, last, failure)
                    done.append(failure)
                else:
                    outcomes = [_checked(each) for each in frame["outcomes"]]
                    self._logged.add(frame, first + len(done), len(outcomes))
                    done += outcomes
                if len(done) >= last - first:
                    return done
        except Lost as lost:
            failure = (None, "timeout" if lost.status == "timeout" else "crashed", str(lost))
        except (KeyError, TypeError, ValueError) as error:
            self._child.stop()
            failure = (None, "crashed", f"something else was written to its pipe: {error}")
        if not self._is_per_answer:
            return self._divide(first, last, failure)
        rest = first + len(done) + 1  # the answer before it is at fault
        return [*done, failure, *(self.run(rest, last) if rest < last else [])]

    @property
    def _is_per_answer(self) -> bool:
        return self._child.is_per_answer[self._function]

    def _divide(self, first: int, last: int, failure: _Result) -> list[_Result]:
        """Scores the halves of answers for which a call failed."""
        if last - first == 1 or not self._is_divisible:
            return [failure] * (last - first)
        middle = (first + last) // 2
        return self.run(first, middle) + self.run(middle, last)

    def _request(self, first: int, last: int) -> dict[str, Any]:
        group, part = self._group, slice(first, last)
        finished = group.finished or [True] * len(group.completions)
        return {
            "function": self._function,
            "limit_s": self._limit_s,
            "prompt": group.prompt,
            "completions": list(group.completions[part]),
            "completion_ids": [[int(token) for token in ids] for ids in group.completion_ids[part]],
            "finished": [bool(each) for each in finished[part]],
            "columns": dict(group.columns),
            "state": dict(group.state),
        }


def _checked(result: Any) -> _Result:
    """Returns a result as it came from a process.

    Raises:
        ValueError: It is none.
    """
    value, status, error = result
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    if status not in STATUSES or (status == "ok") != is_number or not isinstance(error, str):
        raise ValueError("a result has the wrong form")
    return (float(value) if is_number else None), status, error


def _setup(rewards: Sequence[RewardConfig], called: Sequence[int], memory: Path | None) -> dict[str, Any]:
    """Returns the first frame of a process: the options of the rewards that it is to load."""
    functions = [reward for reward in rewards if isinstance(reward, FunctionReward)]
    options = []
    for at in called:
        given = rewards[at].model_dump(mode="json") | {"where": f"objective.rewards.{at}"}
        options.append(given | ({"cache": None if memory is None else str(memory)} if given["kind"] == "judge" else {}))
    return {"rewards": options, "memory_mb": max((each.memory_mb for each in functions), default=1024)}


def digest(rewards: Sequence[RewardConfig]) -> str:
    """Returns a digest of the files that rewards are read from: functions and prompts of judges.

    A run that is resumed with other files would not end as it would have without the interruption.
    """
    total = hashlib.sha256()
    for reward in rewards:
        path = {FunctionReward: "path", JudgeReward: "prompt"}.get(type(reward))
        file = Path(str(getattr(reward, path))) if path is not None else None
        if file is not None and file.is_file():
            total.update(file.read_bytes() + b"\0")
    return total.hexdigest()
