"""What is scored, and the scores.

Legend: G answers to one prompt, F rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ingle.errors import RewardError

#: How the scoring of an answer ended: with a score; without one, because the function returned None; with an
#: exception; too late; with the end of its process; or with something that is not a finite number.
Status = Literal["ok", "none", "error", "timeout", "crashed", "invalid"]
STATUSES: tuple[Status, ...] = get_args(Status)
#: Statuses of answers that should have a score.
FAILURES: tuple[Status, ...] = ("error", "timeout", "crashed", "invalid")


@dataclass(frozen=True, slots=True)
class Group:
    """The answers to one prompt, which are scored together.

    Attributes:
        prompt: The text of the prompt, or its messages as dicts with ``role`` and ``content``.
        completions: The answers as text without special tokens, [G].
        completion_ids: The tokens of each answer, with the one that ended it.
        columns: The other columns of the row, as JSON; functions get them by name.
        finished: Whether the policy ended each answer, [G]; empty for all. Functions get it as ``finished``.
        state: Progress of the run before these answers, under the names of TRL's ``trainer_state``.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    finished: Sequence[bool] = ()
    state: Mapping[str, float] = field(default_factory=lambda: {"global_step": 0, "max_steps": 1, "epoch": 0.0})


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a group.

    Attributes:
        values: [G, F], unweighted; NaN without a score. Columns of trained reward models are NaN.
        statuses: How the scoring of each answer by each reward ended, [G][F].
        errors: What went wrong, by answer and reward.
        extra: Values per answer that functions logged, by name, [G].
        metrics: Mean of each number that functions logged, for a call or for its answers.
        printed: Lines that functions printed; only the first ones of a run.
    """

    values: npt.NDArray[np.float64]
    statuses: tuple[tuple[Status, ...], ...]
    errors: Mapping[tuple[int, int], str] = field(default_factory=dict)
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    printed: tuple[str, ...] = ()


def check_failed(
    scores: Sequence[Scores],
    names: Sequence[str],
    limit: float,
    where: str = "objective.rewards",
    fix: str = "; --objective.max_failed=SHARE allows more failures",
) -> dict[str, str]:
    """Raises if too many answers of an iteration have no score.

    Args:
        scores: The scores of all groups.
        names: Names of the rewards.
        limit: Largest share of the answers that may fail, for each reward.
        where: The option with the rewards, for the error.
        fix: What may be done other than to correct the reward.

    Returns:
        A sentence about each reward that failed for fewer answers, by its name.

    Raises:
        RewardError: With the number of failures by status, and the first error.
    """
    found = {}
    for index, name in enumerate(names):
        ends = Counter(row[index] for each in scores for row in each.statuses)
        failed = sum(ends[status] for status in FAILURES)
        if not failed:
            continue
        message = f"The reward {name} failed for {failed:,} of {ends.total():,} answers"
        first = next((each.errors[key] for each in scores for key in each.errors if key[1] == index), "")
        why = f"{', '.join(f'{ends[status]:,} {status}' for status in FAILURES if ends[status])}; the first: {first}"
        if failed > limit * ends.total():
            raise RewardError(
                f"{message}.",
                where=f"{where}.{index}",
                why=why,
                fix=f"correct what fails and repeat the command{fix}",
            )
        found[name] = f"{message} ({why}); they have no score from it."
    return found
