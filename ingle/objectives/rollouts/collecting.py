"""Samples the answers of an iteration and scores them.

Legend: R answers, F rewards, G answers to a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np

from ingle import stopping
from ingle.data import PromptSet, SequenceSampler
from ingle.errors import RewardError
from ingle.events import Progress, Sink, Warned
from ingle.models import Request, Rollout, Sampler
from ingle.models.generation.rollout import Status
from ingle.objectives.rollouts.advantages import Floats
from ingle.objectives.rollouts.buffer import SampleBuffer
from ingle.objectives.rollouts.journal import Journal
from ingle.objectives.rollouts.recipes import FINISHED, Recipe
from ingle.parallel import Mesh
from ingle.rewards import Group, RewardPool, Scores, check_failed

_STATUSES: tuple[Status, ...] = get_args(Status)


class Iteration(NamedTuple):
    """What the answers of an iteration depend on, next to the weights.

    Attributes:
        number: Its number, from 0.
        draw: The first prompt to draw.
        num_prompts: Prompts to answer.
        step: The step that needs the answers.
        trail: Names the weights.
    """

    number: int
    draw: int
    num_prompts: int
    step: int
    trail: str


#: Scores of a trained reward model for the answers of all ranks, [R]; all ranks call it together.
ModelScorer = Callable[[SampleBuffer], Floats]


@dataclass
class Scoring:
    """Scores answers.

    Attributes:
        pool: Scores groups in processes of its own; None without rewards.
        models: Trained reward models, by the number of their reward.
        max_failed: Largest share of answers that may fail.
    """

    pool: RewardPool | None
    models: Mapping[int, ModelScorer]
    max_failed: float


class Collector:
    """Samples answers and scores them.

    Args:
        prompts: The prompts.
        order: The order in which they are drawn.
        make_sampler: Returns the sampler, once the weights are there.
        make_pool: Returns what scores answers in other processes.
        models: Trained reward models, by the number of their reward.
        tokenizer: The model's tokenizer.
        num_generations: Answers to each prompt.
        max_new_tokens: Longest answer.
        refill: Further prompts, in multiples of those of an iteration, in the place of those that teach nothing.
        stop: Strings that end an answer.
        max_failed: Largest share of the answers of an iteration that may have no score by mistake.
        origin: What the answers depend on, next to weights and prompts, as plain values.
        folder: Where journals are kept.
        mesh: The ranks.
    """

    def __init__(
        self,
        prompts: PromptSet,
        order: SequenceSampler,
        *,
        make_sampler: Callable[[], Sampler],
        make_pool: Callable[[], RewardPool] | None,
        models: Mapping[int, ModelScorer],
        tokenizer: Any,
        num_generations: int,
        max_new_tokens: int,
        refill: int,
        stop: Sequence[str],
        max_failed: float,
        origin: Mapping[str, Any],
        folder: Path,
        mesh: Mesh,
    ) -> None:
        self.folder = folder
        self._prompts, self._order = prompts, order
        self._make_sampler, self._make_pool, self._models = make_sampler, make_pool, models
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop)
        self._num_generations, self._max_new_tokens = num_generations, max_new_tokens
        self._refill, self._max_failed, self._origin, self._mesh = refill, max_failed, origin, mesh
        self._sampler: Sampler | None = None
        self._pool: RewardPool | None = None
        self._open = ExitStack()
