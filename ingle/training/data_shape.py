"""The shape of tokenized data, for the planner."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ingle import data, planning
from ingle.config.objective import rows_of
from ingle.config.policy import Sampled
from ingle.config.run import Run
from ingle.data.shared_prompts import AT_LEAST


def data_shape(
    run: Run,
    dataset: data.TokenDataset,
    sequences: data.Sequences,
    held_out: data.HeldOut | None,
    *,
    shares: bool = False,
) -> planning.DataShape:
    """Returns the shape of the data of a run.

    Args:
        run: The run.
        dataset: Its documents, or its prompts.
        sequences: Those to train on.
        held_out: Those for validation, which may be in the same dataset; None without.
        shares: Whether the model computes a prompt once for all answers to it.
    """
    rows = rows_of(run.objective)
    lengths = dataset.lengths
    computed = _without_prompts(dataset) if shares and getattr(rows, "share_prompts", False) else lengths
    kept = np.ones(len(lengths), np.bool_)
    if held_out is not None and held_out.dataset is dataset:
        kept[held_out.documents] = False
    if isinstance(rows, Sampled):
        longest = rows.rollout.max_new_tokens
        return planning.sampled_shape(
            rows,
            int(kept.sum()),
            float(lengths[kept].mean()),
            int(lengths[kept].max()),
            shares=shares,
            validation_tokens=0 if held_out is None else held_out.num_tokens + len(held_out.documents) * longest,
        )
    return planning.DataShape(
        num_sequences=len(sequences),
        num_tokens=int(computed[kept].sum(dtype=np.int64)),
        longest=sequences.longest(computed),
        longest_document=int(lengths[kept].max()),
        mean_document=float(lengths[kept].mean()),
        validation_tokens=0 if held_out is None else held_out.num_tokens,
    )


def _without_prompts(dataset: data.TokenDataset) -> npt.NDArray[np.int64]:
    """Returns the tokens that are computed for each document if the documents of a row share their prompt, [D].

    The prompt is what comes before the first label.
    """
    computed = dataset.lengths.astype(np.int64)
    if dataset.groups is None or dataset.groups.names == ("source", "target"):
        return computed
    for first, stop in pairwise(dataset.groups.offsets.tolist()):
        masks = (dataset.tokens.read(document)[1] for document in range(first, stop))
        shared = min(int(mask.argmax()) if mask.any() else len(mask) for mask in masks) - 1
        if shared >= AT_LEAST:
            computed[first + 1 : stop] -= shared
    return computed
