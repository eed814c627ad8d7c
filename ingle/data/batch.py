"""Samples to a padding-free micro-batch, and its length to a round one."""

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


def round_up(batch: Batch) -> Batch:
    """Adds a document that nobody learns from, so that the row's length is a multiple of 64 (of 16 below 512).

    A CPU's matrix library makes code for every length it meets and keeps much of it: thousands of lengths cost
    hundreds of megabytes, and time to make them.  No other document sees the added one; its labels carry no loss.
    """
    multiple = 64 if batch.num_tokens >= 512 else 16
    missing = -batch.num_tokens % multiple
    if not missing:
        return batch
    zeros = torch.zeros(1, missing, dtype=torch.int64)
    return Batch(
        input_ids=torch.cat([batch.input_ids, zeros], 1),
        labels=torch.cat([batch.labels, torch.full_like(zeros, IGNORE_INDEX)], 1),
        position_ids=torch.cat([batch.position_ids, torch.arange(missing)[None]], 1),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + missing]),
        num_tokens=batch.num_tokens,
        num_supervised=batch.num_supervised,
    )
