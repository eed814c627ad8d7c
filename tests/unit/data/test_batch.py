"""Batches: documents laid end to end, columns by name, positions and bounds exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ingle.data.batch import COLUMNS, collate, round_up
from ingle.data.types import IGNORE_INDEX, Sample

PAIR = {
    "group_ids": np.int64(7),
    "document_labels": np.float32(0.5),
    "document_weights": np.float32(2),
    "start_labels": np.int64(1),
    "end_labels": np.int64(2),
    "parent_offsets": np.int32(0),
    "scores": np.float32(1),
    "truncated": np.int8(1),
    "baselines": np.float32(0.5),
    "draws": np.int64(5),
    "answers": np.int64(1),
}


def make_sample(ids: list[int], supervised: list[int], **columns: object) -> Sample:
    array = np.array(ids, dtype=np.int32)
    return Sample(array, np.where(supervised, array, IGNORE_INDEX).astype(np.int32), columns)  # type: ignore[arg-type]


def make_pair(length: int, decoder_length: int) -> Sample:
    """A sample with every kind of column, of an encoder and a decoder."""
    ids, decoder = np.arange(length), np.arange(decoder_length)
    tokens = {"token_labels": ids % 3, "weights": ids / 2, "decoder_input_ids": decoder, "decoder_labels": decoder}
    tokens |= {"token_type_ids": ids % 2, "reference_logps": -ids / 4, "decoder_reference_logps": -decoder / 4}
    of_policies = ("old_logps", "values", "advantages", "returns", "correction_weights", "reference_states")
    tokens |= {name: ids / (5 + place) for place, name in enumerate(of_policies)}
    return make_sample(list(range(length)), [0] * length, **tokens, **PAIR)


def test_a_document_may_have_several_labels() -> None:
    ids = np.arange(3, dtype=np.int32)
    samples = [Sample(ids, ids, {"document_labels": np.array([row], np.float32)}) for row in ((0, 1), (1, 1))]
    more = round_up(collate(samples))
    assert more.columns["document_labels"].tolist() == [[0, 1], [1, 1], [0, 0]]


def test_documents_are_laid_end_to_end() -> None:
    batch = collate([make_sample([5, 6, 7], [0, 1, 1]), make_sample([8], [0]), make_sample([9, 1], [0, 1])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, -100, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.num_tokens, batch.num_documents, batch.num_supervised) == (6, 3, 3)


def test_a_label_need_not_be_the_token_and_the_first_may_count() -> None:
    sample = Sample(np.array([5, 6], np.int32), np.array([3, IGNORE_INDEX], np.int32))
    batch = collate([sample, sample])
    assert batch.labels.tolist() == [[3, -100, 3, -100]]
    assert batch.num_supervised == 2
    assert batch.next_labels().tolist() == [-100, -100, -100, -100], "no label comes from another document"


def test_next_labels_are_those_of_the_same_document() -> None:
    batch = collate([make_sample([5, 6, 7], [1, 1, 1]), make_sample([9, 1], [0, 1])])
    assert batch.next_labels().tolist() == [6, 7, -100, 1, -100]


def test_columns_of_every_kind_are_joined_and_rounded_up() -> None:
    batch = collate([make_pair(3, 2), make_pair(5, 14)])
    assert batch.columns["group_ids"].tolist() == [7, 7]
    assert batch.columns["weights"].tolist() == [[0, 0.5, 1, 0, 0.5, 1, 1.5, 2]]
    assert batch.columns["decoder_cu_seqlens"].tolist() == [0, 2, 16]
    assert batch.columns["decoder_position_ids"].tolist() == [[0, 1, *range(14)]]
    assert batch.num_supervised == 16, "the labels of an encoder-decoder are the decoder's"
    more = round_up(batch)
    assert batch.columns.keys() == more.columns.keys() == COLUMNS.keys()
    for name, column in more.columns.items():
        before = batch.columns[name]
        added = column[..., before.shape[-1] :]
        assert column[..., : before.shape[-1]].equal(before), name
        assert column.dtype == COLUMNS[name].dtype, name
        if COLUMNS[name].per != "bounds" and not name.endswith("position_ids"):
            assert (added == COLUMNS[name].fill).all(), name
    assert more.columns["cu_seqlens"].tolist() == [0, 3, 8, 16]
    assert more.columns["decoder_cu_seqlens"].tolist() == [0, 2, 16, 32], "both rows get the added document"
    assert more.columns["group_ids"].tolist() == [7, 7, -1]


@pytest.mark.parametrize(("lengths", "rounded"), [((3, 5), 16), ((16,), 16), ((500, 13), 576), ((512,), 512)])
def test_rounding_up_adds_a_document_without_loss(lengths: tuple[int, ...], rounded: int) -> None:
    batch = collate([make_sample(list(range(n)), [0, *[1] * (n - 1)]) for n in lengths])
    more = round_up(batch)
    assert more.input_ids.shape == more.labels.shape == more.position_ids.shape == (1, rounded)
    assert more.cu_seqlens[: len(lengths) + 1].tolist() == batch.cu_seqlens.tolist()
    assert more.cu_seqlens[-1] == rounded
    assert replace(more, columns={}) == replace(batch, columns={}), "the counts leave the added document out"
    assert (more.labels[0, batch.num_tokens :] == IGNORE_INDEX).all()
    assert more.position_ids[0, batch.num_tokens :].tolist() == list(range(rounded - batch.num_tokens))


def test_to_moves_every_column() -> None:
    batch = collate([make_pair(2, 2)]).to("meta")
    assert {column.device.type for column in batch.columns.values()} == {"meta"}


@pytest.mark.parametrize("parts", [1, 2, 3, 10])
def test_parts_joined_are_the_batch(parts: int) -> None:
    lengths = [(4, 2), (1, 9), (7, 1), (3, 3), (5, 2)]
    batch = collate([make_pair(*length) for length in lengths])
    batch.columns["group_ids"][:] = torch.tensor([0, 0, 1, 2, 2])  # rows of one and two documents
    found = round_up(batch).split(parts)
    assert len(found) == min(parts, 3), "a row is not split"
    for name, column in batch.columns.items():
        kind = COLUMNS[name].per
        if kind != "bounds":
            assert torch.equal(torch.cat([part.columns[name] for part in found], -1), column)
        else:
            assert torch.equal(torch.cat([part.columns[name].diff() for part in found]), column.diff())
    for part in found:
        assert part.num_tokens == part.input_ids.shape[1] == part.cu_seqlens[-1]
        assert part.num_documents == len(part.cu_seqlens) - 1
    assert sum(part.num_supervised for part in found) == batch.num_supervised


def test_parts_have_about_equal_numbers_of_tokens() -> None:
    batch = collate([make_sample([1] * length, [1] * length) for length in (10, 30, 5, 5, 20, 10)])
    assert [part.num_tokens for part in batch.split(2)] == [40, 40]
    assert [part.num_tokens for part in batch.split(4)] == [10, 30, 10, 30]
