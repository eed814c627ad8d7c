"""Samples to a padding-free micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ingle.data.types import IGNORE_INDEX, Batch, Sample


def collate(samples: Sequence[Sample]) -> Batch:
    """Put documents one after the other into one row.

    Positions restart in every document, and ``cu_seqlens`` says where each begins, so that attention can stay
    inside it.  The first label of a document is ``IGNORE_INDEX``: with labels shifted by one, the last token of
    a document predicts nothing.
    """
    assert samples, "an empty batch"
    lengths = [len(sample.input_ids) for sample in samples]
    labels = np.concatenate([sample.labels for sample in samples]).astype(np.int64)
    ends = np.cumsum([0, *lengths])
    assert np.all(labels[ends[:-1]] == IGNORE_INDEX), "the first token of a document is predicted by nothing"
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
        num_tokens=len(ids),
        num_supervised=int(np.count_nonzero(labels != IGNORE_INDEX)),
    )
