"""Ranks get the micro-batches that one process makes, and equally many of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ingle.data.types import IGNORE_INDEX, Sample
from ingle.objectives.dealing import deal, start_without_labels
from ingle.parallel import Mesh

ALONE = Mesh(torch.device("cpu"))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_micro_batch_is_dealt_once_and_in_order(world_size: int, micro_batch_size: int) -> None:
    items = list(range(7))
    ranks = [
        deal(items, micro_batch_size, replace(ALONE, dist_rank=r, world_size=world_size)) for r in range(world_size)
    ]
    assert len({len(parts) for parts in ranks}) == 1
    in_order = [part for turn in zip(*ranks, strict=True) for part in turn]
    expected = deal(items, micro_batch_size, ALONE)
    assert in_order[: len(expected)] == expected
    assert not any(in_order[len(expected) :])
    assert len(in_order) - len(expected) < world_size
    assert [item for part in expected for item in part] == items


def test_a_rank_without_data_counts_nothing() -> None:
    ids = np.arange(5, 12, dtype=np.int32)
    batch = start_without_labels(Sample(ids, ids.copy()))
    assert bool((batch.labels == IGNORE_INDEX).all())
    assert (batch.num_tokens, batch.num_documents, batch.num_supervised) == (0, 0, 0)
