"""Combinations that make no sense in a task."""

from __future__ import annotations

import re
from collections import Counter

from ingle.config.evaluate import TaskConfig
from ingle.config.rule import Rule

#: What compiling a text raises: also for a repetition beyond 32 bits, and for thousands of nested groups.
_NOT_A_REGEX = (re.error, OverflowError, RecursionError)


def _groups(pattern: str) -> int | None:
    """How many groups a regular expression has; None when it is not one."""
    try:
        return re.compile(pattern).groups
    except _NOT_A_REGEX:
        return None


def _regex_error(pattern: str) -> str:
    try:
        re.compile(pattern)
    except _NOT_A_REGEX as error:
        return str(error)
    return ""


def _twice(names: tuple[str, ...]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def task_rules(at: str) -> tuple[Rule[TaskConfig], ...]:
    """The rules of a task; ``at`` is where its options stand: ``evaluate.`` in a run."""
    return (
        Rule(
            "metrics-once",
            lambda task: bool(_twice(task.metrics)),
            lambda task: f"The list of metrics names {', '.join(_twice(task.metrics))} twice.",
            f"{at}metrics",
            lambda task: f"--{at}metrics=[{','.join(dict.fromkeys(task.metrics))}]",
        ),
        Rule(
            "pattern-is-a-regex",
            lambda task: task.answer_pattern is not None and _groups(task.answer_pattern) is None,
            lambda task: f"The answer pattern is not a regular expression: {_regex_error(task.answer_pattern or '')}.",
            f"{at}answer_pattern",
            lambda task: rf"--{at}answer_pattern='#### (\S+)', for example",
        ),
        Rule(
            "pattern-has-a-group",
            lambda task: task.answer_pattern is not None and _groups(task.answer_pattern) == 0,
            lambda task: "The answer pattern has no group, so it does not say which part is the answer.",
            f"{at}answer_pattern",
            lambda task: f"--{at}answer_pattern='({task.answer_pattern})'",
        ),
        Rule(
            "pattern-needs-exact-match",
            lambda task: task.answer_pattern is not None and "exact_match" not in task.metrics,
            lambda task: "The answer pattern is used by exact_match alone, which is not among the metrics.",
            f"{at}answer_pattern, {at}metrics",
            lambda task: f"--{at}metrics=[{','.join(('exact_match', *task.metrics))}] or --{at}answer_pattern=null",
        ),
        Rule(
            "top-p-needs-temperature",
            lambda task: task.top_p < 1 and task.temperature == 0,
            lambda task: f"top_p = {task.top_p} has no effect: at temperature 0 the likeliest token is always taken.",
            f"{at}top_p, {at}temperature",
            lambda task: f"--{at}temperature=0.7 or --{at}top_p=1",
        ),
        Rule(
            "stop-says-something",
            lambda task: "" in task.stop,
            lambda task: "An empty stop text would end every answer before its first token.",
            f"{at}stop",
            lambda task: f"--{at}stop={[text for text in task.stop if text]}",
        ),
    )


TASK_RULES: tuple[Rule[TaskConfig], ...] = task_rules("")
