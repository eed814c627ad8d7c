"""Sampled answers with their scores.

Legend: R answers, F rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np

from ingle.data import PromptSet
from ingle.models import Rollout
from ingle.models.generation.rollout import Status
from ingle.objectives.rollouts.advantages import Floats, Integers, Mask
from ingle.objectives.rollouts.buffer import SampleBuffer
from ingle.rewards import Scores

STATUSES: tuple[Status, ...] = get_args(Status)
#: Statuses of answers that the policy ended.
FINISHED: tuple[Status, ...] = ("stop", "string")


class Asked(NamedTuple):
    """A prompt to answer.

    Attributes:
        draw: Its number in the run, which the noise of its answers depends on.
        row: Its place among the prompts.
    """

    draw: int
    row: int


class Answered(NamedTuple):
    """Answers and their scores.

    Attributes:
        buffer: The answers of all ranks; those to a prompt are adjacent.
        scores: Their scores, float64 [R, F]; NaN for none.
        groups: The scores of each prompt, in the order of the buffer.
    """

    buffer: SampleBuffer
    scores: Floats
    groups: Sequence[Scores]


def finished(buffer: SampleBuffer) -> Mask:
    """Returns whether the policy ended each answer, bool [R]."""
    return np.isin(buffer["statuses"], [STATUSES.index(status) for status in FINISHED])


def make_buffer(
    prompts: PromptSet, asked: Sequence[Asked], rollouts: Mapping[tuple[int, int], Rollout]
) -> SampleBuffer:
    """Returns answers in the order of their draws and numbers."""
    rows = {each.draw: each.row for each in asked}
    found = [rollouts[key] for key in sorted(rollouts)]
    questions = [prompts.ids(rows[each.draw]) for each in found]
    columns: dict[str, Any] = {
        "prompt_ids": np.concatenate(questions).astype(np.int32),
        "prompt_lengths": np.array([len(each) for each in questions], np.int64),
        "ids": np.concatenate([each.ids for each in found]).astype(np.int32),
        "lengths": np.array([len(each.ids) for each in found], np.int64),
        "draws": np.array([each.draw for each in found], np.int64),
        "answers": np.array([each.answer for each in found], np.int64),
        "rows": np.array([rows[each.draw] for each in found], np.int64),
        "statuses": np.array([STATUSES.index(each.status) for each in found], np.int8),
        "sampler_logps": np.concatenate([each.logps for each in found]).astype(np.float32),
        "entropies": np.concatenate([each.entropies for each in found]).astype(np.float32),
    }
    return SampleBuffer(columns)


def joined(parts: Sequence[Answered]) -> Answered:
    """Returns the answers of several parts, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return Answered(
        SampleBuffer.joined([part.buffer for part in parts]),
        np.concatenate([part.scores for part in parts]),
        [group for part in parts for group in part.groups],
    )


def selected(answered: Answered, rows: Integers) -> Answered:
    """Returns some answers, in the order of ``rows``, with the scores of all groups."""
    return Answered(answered.buffer.select(rows), answered.scores[rows], answered.groups)


def pick(teaches_R: Any, num_generations: int, wanted: int) -> Integers:
    """Returns the answers of ``wanted`` groups, in their order: those that teach something first."""
    groups = np.asarray(teaches_R).reshape(-1, num_generations)[:, 0]
    order = np.argsort(~groups, kind="stable")[:wanted]
    return (np.sort(order)[:, None] * num_generations + np.arange(num_generations)).ravel().astype(np.int64)
