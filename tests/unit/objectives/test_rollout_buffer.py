"""The sample buffer: its answers are the same however they are picked, split, stored or joined."""

from __future__ import annotations

import numpy as np
import pytest

from ingle.data.types import IGNORE_INDEX
from ingle.objectives.rollouts.buffer import SampleBuffer

PROMPTS, LENGTHS = np.array([2, 2, 1, 1, 3, 3]), np.array([3, 1, 2, 2, 4, 1])


def make() -> SampleBuffer:
    rng = np.random.default_rng(0)
    buffer = SampleBuffer(
        {
            "prompt_ids": np.arange(100, 112, dtype=np.int32),
            "prompt_lengths": PROMPTS,
            "ids": np.arange(13, dtype=np.int32),
            "lengths": LENGTHS,
            "draws": np.array([4, 4, 5, 5, 6, 6]),
            "answers": np.array([0, 1] * 3),
            "rows": np.array([9, 9, 2, 2, 7, 7]),
        }
    )
    counted = np.ones(13, bool)
    counted[[1, 12]] = False
    return buffer.adding(rewards=rng.normal(size=6), advantages=np.arange(13) / 10, counted=counted)


def same(first: SampleBuffer, second: SampleBuffer) -> bool:
    return first.columns.keys() == second.columns.keys() and all(
        np.array_equal(values, second[name]) and values.dtype == second[name].dtype
        for name, values in first.columns.items()
    )


def test_parts_and_copies_have_the_same_answers() -> None:
    buffer = make()
    parts = [buffer.select(np.array(rows)) for rows in ([0, 1], [2], [3, 4, 5])]
    assert same(SampleBuffer.joined(parts), buffer)
    assert same(SampleBuffer.from_state(buffer.state_dict()), buffer)
    picked = buffer.select(np.array([4, 0]))
    assert picked["ids"].tolist() == [8, 9, 10, 11, 0, 1, 2]
    assert picked["prompt_ids"].tolist() == [106, 107, 108, 100, 101]
    assert [values.tolist() for values in picked.by_answer("ids")] == [[8, 9, 10, 11], [0, 1, 2]]
    assert len(buffer.select(np.zeros(0, np.int64))) == 0


def test_an_answer_is_a_document_with_labels_at_the_counted_tokens() -> None:
    first, last = make().samples(np.array([0, 5]))
    assert first.input_ids.tolist() == [100, 101, 0, 1, 2]
    assert first.labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 0, IGNORE_INDEX, 2]
    assert first.columns["advantages"] == pytest.approx([0, 0, 0, 0.1, 0.2])
    assert first.columns["group_ids"] == 4 and first.columns["answers"] == 0
    assert first.input_ids.dtype == first.labels.dtype == np.int32
    assert "rewards" not in first.columns and "counted" not in first.columns
    assert (last.labels == IGNORE_INDEX).all()
    assert make().samples(np.array([5]), masked=False)[0].labels.tolist() == [IGNORE_INDEX] * 3 + [12]


def test_minibatches_contain_every_answer_once() -> None:
    buffer = make()
    reverse = lambda count: np.arange(count)[::-1]  # noqa: E731
    batches = {by: buffer.minibatches(2, reverse, by_group=by) for by in (False, True)}
    assert [rows.tolist() for rows in buffer.minibatches(3)] == [[0, 1, 2], [3, 4, 5]]
    assert [rows.tolist() for rows in batches[False]] == [[5, 4], [3, 2], [1, 0]]
    assert [rows.tolist() for rows in batches[True]] == [[4, 5], [2, 3], [0, 1]]


def test_columns_of_the_wrong_length_or_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="advantages"):
        make().adding(advantages=np.zeros(5))
    with pytest.raises(KeyError):
        make().adding(advantage=np.zeros(13))
