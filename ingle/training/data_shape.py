"""The shape of tokenized data, for the planner."""

from __future__ import annotations

from typing import Any

import numpy as np

from ingle import data, planning
from ingle.config.objective import rows_of
from ingle.config.policy import Sampled
from ingle.config.policy_rules import rows_per_iteration
from ingle.config.run import Run


def data_shape(
    run: Run, dataset: data.TokenDataset, sequences: data.Sequences, held_out: data.HeldOut | None
) -> planning.DataShape:
    """Returns the shape of the data of a run.

    Args:
        run: The run.
        dataset: Its documents, or its prompts.
        sequences: Those to train on.
        held_out: Those for validation, which may be in the same dataset; None without.
    """
    lengths = dataset.lengths
    if held_out is not None and held_out.dataset is dataset:
        lengths = lengths[np.isin(np.arange(len(lengths)), held_out.documents, invert=True)]
    rows = rows_of(run.objective)
    if isinstance(rows, Sampled):
        return _sampled_shape(rows, lengths, held_out)
    return planning.DataShape(
        num_sequences=len(sequences),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        longest=sequences.longest(dataset.lengths),
        longest_document=int(lengths.max()),
        mean_document=float(lengths.mean()),
        validation_tokens=0 if held_out is None else held_out.num_tokens,
    )


def _sampled_shape(
    objective: Sampled, prompts: np.ndarray[Any, Any], held_out: data.HeldOut | None
) -> planning.DataShape:
    """Returns the shape of answers to all prompts; those that the model will give are taken as half as long as allowed.

    The longest is as long as allowed, so that memory suffices whatever the model answers.
    """
    per_prompt = rows_per_iteration(objective) // objective.num_prompts
    longest = objective.rollout.max_new_tokens
    mean = float(prompts.mean()) + (longest + 1) // 2
    number = len(prompts) * per_prompt
    return planning.DataShape(
        num_sequences=number,
        num_tokens=round(number * mean),
        longest=int(prompts.max()) + longest,
        longest_document=int(prompts.max()) + longest,
        mean_document=mean,
        validation_tokens=0 if held_out is None else held_out.num_tokens + len(held_out.documents) * longest,
    )
