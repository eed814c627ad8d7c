"""Scores the answers of a task with reward functions, in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ingle.config.evaluate import TaskConfig
from ingle.data.compiled_template import as_mapping
from ingle.evaluation.run.answer_sources import Answer
from ingle.evaluation.tasks.samples import TaskSample
from ingle.events import Sink, Warned
from ingle.rewards import Group, RewardPool, check_failed

#: Largest share of the answers that may fail: nothing is learned from them, so only systematic failures are an error.
_MAX_FAILED = 0.2
#: The option with the rewards of a task.
_WHERE = "evaluate.rewards"


def reward_answers(
    samples: Sequence[TaskSample], answers: Sequence[Answer], texts: Sequence[str], task: TaskConfig, sink: Sink
) -> tuple[float, ...]:
    """Returns the weighted sum of the rewards of each answer; NaN for one without any.

    Args:
        samples: The samples.
        answers: The answers as they were generated.
        texts: The answers as they are scored.
        task: Has the rewards.
        sink: Receives what functions print.

    Raises:
        RewardError: A function cannot be loaded, or fails for too many answers.
    """
    with RewardPool(task.rewards) as pool:
        waiting = [
            pool.submit(_group(sample, answer, text))
            for sample, answer, text in zip(samples, answers, texts, strict=True)
        ]
        found = [outcome.take() for outcome in waiting]
    for text in check_failed(found, pool.names, _MAX_FAILED, _WHERE, fix="").values():
        sink(Warned(text, where=_WHERE))
    for line in (line for scores in found for line in scores.printed):
        sink(Warned(f"A reward function printed: {line}", where=_WHERE))
    weights_F = np.array([reward.weight for reward in task.rewards])
    values_SF = np.concatenate([scores.values for scores in found])
    sums_S = np.where(np.isnan(values_SF).all(1), np.nan, np.nansum(values_SF * weights_F, axis=1))
    return tuple(sums_S.tolist())


def _group(sample: TaskSample, answer: Answer, text: str) -> Group:
    """Returns one answer as a group; its row has the reference as column ``answer``, as in training."""
    example = sample.example
    prompt = [as_mapping(message) for message in example.messages[:-1]] if example.messages else sample.prompt
    columns = {"answer": sample.references[0], **example.columns}
    return Group(prompt, [text], [answer.token_ids], columns, [answer.finish_reason == "stop"])
