"""Rewards: scores sampled answers with functions, rules and judges, which run in processes of their own.

Everything is imported on first use: the processes load neither numpy nor the config.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingle.rewards.pool import RewardPool, digest
    from ingle.rewards.scores import Group, Scores, Status, check_failed

__all__ = ["Group", "RewardPool", "Scores", "Status", "check_failed", "digest"]

_MODULES = {"RewardPool": "pool", "digest": "pool"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"ingle.rewards.{_MODULES.get(name, 'scores')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
