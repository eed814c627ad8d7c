"""Padding-free batches: documents one after the other, positions and borders exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ingle.data.batch import collate, round_up
from ingle.data.types import IGNORE_INDEX, Sample


def make_sample(ids, supervised):
    ids = np.array(ids, dtype=np.int32)
    return Sample(ids, np.where(supervised, ids, IGNORE_INDEX).astype(np.int32))


def test_documents_are_concatenated():
    batch = collate([make_sample([5, 6, 7], [0, 1, 1]), make_sample([8], [0]), make_sample([9, 1], [0, 1])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, -100, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.num_tokens, batch.num_supervised) == (6, 3)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32


def test_targets_are_the_next_labels_and_never_those_of_another_document():
    batch = collate([make_sample([5, 6, 7], [0, 1, 1]), make_sample([9, 1], [0, 1])])
    assert batch.targets().tolist() == [6, 7, -100, 1, -100]


def test_a_document_whose_first_token_carries_loss_is_a_bug():
    with pytest.raises(AssertionError):
        collate([make_sample([5, 6], [1, 1])])


def test_to_moves_every_tensor():
    batch = collate([make_sample([5, 6], [0, 1])]).to("meta")
    assert {t.device.type for t in (batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens)} == {"meta"}
    assert (batch.num_tokens, batch.num_supervised) == (2, 1)


@pytest.mark.parametrize(("lengths", "rounded"), [((3, 5), 16), ((16,), 16), ((500, 13), 576), ((512,), 512)])
def test_rounding_up_adds_a_document_without_loss(lengths, rounded):
    batch = collate([Sample(np.arange(n, dtype=np.int32), _labels(n)) for n in lengths])
    more = round_up(batch)
    assert more.input_ids.shape == more.labels.shape == more.position_ids.shape == (1, rounded)
    assert more.cu_seqlens[: len(lengths) + 1].tolist() == batch.cu_seqlens.tolist()
    assert more.cu_seqlens[-1] == rounded
    assert (more.num_tokens, more.num_supervised) == (batch.num_tokens, batch.num_supervised)
    assert (more.labels[0, batch.num_tokens :] == IGNORE_INDEX).all()
    assert more.position_ids[0, batch.num_tokens :].tolist() == list(range(rounded - batch.num_tokens))


def _labels(n):
    return np.concatenate([[IGNORE_INDEX], np.arange(1, n)]).astype(np.int32)
