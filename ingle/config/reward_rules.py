"""Invalid combinations of the options of a reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from ingle.config.policy import Rewarded
from ingle.config.rewards import RewardConfig
from ingle.config.rule import Rule
from ingle.config.run import Run


def _why_no_pattern(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error) or type(error).__name__
    return None


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        return False


#: By kind: the option at fault, whether it is, what is wrong, and what to do.
_FAULTS: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], str], str]] = {
    "length": (
        "low",
        lambda reward: reward.low > reward.high,
        lambda reward: f"No answer has at least {reward.low} and at most {reward.high} tokens.",
        "make low smaller than high",
    ),
    "overlong": (
        "buffer",
        lambda reward: reward.buffer > reward.max,
        lambda reward: f"The reward cannot fall over {reward.buffer} tokens before the token {reward.max}.",
        "make buffer smaller than max",
    ),
    "format": (
        "pattern",
        lambda reward: _why_no_pattern(reward.pattern) is not None,
        lambda reward: f"The pattern is not a regular expression: {_why_no_pattern(reward.pattern)}.",
        "correct it",
    ),
    "judge": (
        "url",
        lambda reward: not _is_url(reward.url) or reward.scale[0] >= reward.scale[1],
        lambda reward: (
            f"{reward.url} is not the address of a server."
            if not _is_url(reward.url)
            else f"No grade lies between {reward.scale[0]:g} and {reward.scale[1]:g}."
        ),
        "write url as http://localhost:8000/v1, and scale as [1, 10]",
    ),
}


def _fault(run: Run) -> tuple[int, RewardConfig] | None:
    """Returns the first reward that cannot be, and its number."""
    rewards: Sequence[RewardConfig] = run.objective.rewards if isinstance(run.objective, Rewarded) else ()
    wrong = (each for each in enumerate(rewards) if each[1].kind in _FAULTS and _FAULTS[each[1].kind][1](each[1]))
    return next(wrong, None)


def _message(run: Run) -> str:
    number, reward = _fault(run) or (0, None)
    assert reward is not None, "the rule applies"
    return f"Reward {number + 1} ({reward.kind}): {_FAULTS[reward.kind][2](reward)}"


def _fix(run: Run) -> str:
    number, reward = _fault(run) or (0, None)
    assert reward is not None, "the rule applies"
    option, _, _, fix = _FAULTS[reward.kind]
    return f"{fix}: --objective.rewards.{number}.{option}=VALUE"


REWARD_RULES: tuple[Rule[Run], ...] = (
    Rule("rewards-are-possible", lambda run: _fault(run) is not None, _message, "objective.rewards", _fix),
)
