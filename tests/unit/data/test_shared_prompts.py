"""Trees of documents with a common start: their paths are the documents, whatever the columns are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ingle.data.batch import Batch, collate, round_up
from ingle.data.shared_prompts import share
from ingle.data.types import IGNORE_INDEX, Sample
from ingle.kernels.attention.trees import Trees


def sample(ids: list[int], prompt: int, row: int, **columns: Any) -> Sample:
    labels = np.array([IGNORE_INDEX] * prompt + ids[prompt:], np.int32)
    return Sample(np.array(ids, np.int32), labels, {"group_ids": np.int64(row), **columns})


def make_rows(seed: int = 0) -> list[Sample]:
    """Rows of one to five documents, of which some have much in common."""
    generator = np.random.default_rng(seed)
    samples = []
    for row in range(12):
        prompt = generator.integers(1, 9, int(generator.integers(1, 30))).tolist()
        for number in range(int(generator.integers(1, 6))):
            answer = generator.integers(1, 4, int(generator.integers(1, 12))).tolist()
            samples.append(sample(prompt + answer, len(prompt), row, document_labels=np.float32(number)))
    return samples


def paths_of(batch: Batch) -> tuple[Trees, list[torch.Tensor]]:
    trees = Trees.of(batch.cu_seqlens.tolist(), batch.parents() or [])
    assert trees is not None
    return trees, list(trees.paths.index_M.split(trees.paths.cu_seqlens.diff().tolist()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("at_least", [1, 8])
def test_paths_are_the_documents(seed: int, at_least: int) -> None:
    samples = make_rows(seed)
    batch = collate(share(samples, at_least=at_least))
    _, paths = paths_of(batch)
    for path, given in zip(paths, samples, strict=True):
        assert batch.input_ids[0, path].tolist() == given.input_ids.tolist()
        assert batch.position_ids[0, path].tolist() == list(range(len(given.input_ids)))
        # What each token predicts; at the end of a root that is left to the answer's own first token.
        predicted = [label for label in batch.next_labels()[path].tolist() if label != IGNORE_INDEX]
        assert predicted == given.labels[given.labels != IGNORE_INDEX].tolist()
    answers = batch.answers()
    assert torch.equal(batch.columns["document_labels"][answers], collate(samples).columns["document_labels"])
    assert torch.equal(batch.columns["group_ids"][answers], collate(samples).columns["group_ids"])
    assert batch.num_supervised == collate(samples).num_supervised
    assert int(batch.multiplicity().sum()) == sum(map(len, paths))


def test_an_answer_begins_with_the_last_shared_token() -> None:
    first, second = sample([5, 6, 7, 8, 1, 2], 4, 0), sample([5, 6, 7, 8, 3], 4, 0)
    root, *answers = share([first, second], at_least=3)
    assert root.input_ids.tolist() == [5, 6, 7]
    assert [answer.input_ids.tolist() for answer in answers] == [[8, 1, 2], [8, 3]]
    assert [s.columns["parent_offsets"].tolist() for s in (root, *answers)] == [[0], [1], [2]]
    assert share([first, second], at_least=4) == [first, second]


def test_the_common_start_ends_before_the_first_label() -> None:
    long, short = sample([5, 6, 7, 8, 1, 2], 4, 0), sample([5, 6, 7, 8, 1, 2, 3], 3, 0)
    assert [len(s.input_ids) for s in share([long, short], at_least=1)] == [2, 4, 5]
    one_contains_the_other = share([long, sample([5, 6, 7, 8], 4, 0)], at_least=1)
    assert [s.input_ids.tolist() for s in one_contains_the_other] == [[5, 6, 7], [8, 1, 2], [8]]


def test_tokens_with_other_types_are_not_shared() -> None:
    first, second = (
        sample([5, 6, 7, 8, 1], 4, 0, token_type_ids=np.array(types)) for types in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    )
    assert [len(s.input_ids) for s in share([first, second], at_least=1)] == [1, 4, 4]


def test_supervised_prompts_are_predicted_once() -> None:
    first, second = sample([5, 6, 7, 8, 1, 2], 1, 0), sample([5, 6, 7, 8, 3], 1, 0)
    batch = round_up(collate(share([first, second], at_least=1, supervised=True)))
    assert batch.next_labels()[: batch.num_tokens].tolist() == [6, 7, 8, 1, 2, -100, 3, -100]
    sums_D = torch.tensor([10.0, 1.0, 2.0, 0.0], requires_grad=True)
    total = batch.path_sums(sums_D)
    assert total.tolist() == [10, 11, 12, 0] and batch.answers().tolist() == [1, 2]
    (gradient,) = torch.autograd.grad(total[batch.answers()].sum(), sums_D)
    assert gradient.tolist() == [2, 1, 1, 0]
    assert first.labels.tolist() == [IGNORE_INDEX, 6, 7, 8, 1, 2], "the given documents stay as they are"


def test_deeper_trees_add_up_along_the_path() -> None:
    offsets = [0, 1, 1, 3, 0]
    batch = collate([sample([1, 2], 1, 0, parent_offsets=np.int32(offset)) for offset in offsets])
    assert batch.parents() == [-1, 0, 1, 0, -1]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 0, 1]]
    assert batch.path_sums(torch.tensor([[1.0], [2], [4], [8], [16]])).flatten().tolist() == [1, 3, 7, 9, 16]
    assert batch.answers().tolist() == [2, 3, 4]
    assert batch.multiplicity().tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]


def test_trees_are_not_split() -> None:
    batch = round_up(collate(share(make_rows(), at_least=1)))
    found = batch.split(100)
    assert len(found) == 12
    for part in found:
        assert (part.columns["parent_offsets"][0] == 0) and len(part.columns["group_ids"].unique()) == 1
    assert torch.equal(torch.cat([part.position_ids for part in found], 1), batch.position_ids[:, : batch.num_tokens])
    without_groups = Batch(
        {name: column for name, column in batch.columns.items() if name != "group_ids"},
        batch.num_tokens,
        batch.num_documents,
        batch.num_supervised,
    )
    assert all(part.columns["parent_offsets"][0] == 0 for part in without_groups.split(100))


def test_rows_without_a_common_start_stay_as_they_are() -> None:
    samples = [sample([1, 2, 3], 1, 0), sample([4, 2, 3], 1, 0), sample([1, 2, 3], 1, 1)]
    assert share(samples, at_least=1) == samples
    batch = collate(samples)
    assert batch.parents() is None and batch.answers().tolist() == [0, 1, 2]


def test_targets_of_one_source() -> None:
    sources, targets = ([5, 6, 7], [5, 6, 7], [5, 6], [5, 6, 7]), ([1], [2, 3], [4], [8])
    pairs = [
        sample(source, len(source), 0, decoder_input_ids=np.array(target), decoder_labels=np.array(target))
        for source, target in zip(sources, targets, strict=True)
    ]
    batch = round_up(collate(share(pairs, at_least=3)))
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 5, 8, 16]
    assert batch.parents() == [-1, 0, -1, -1, -1]
    assert batch.columns["decoder_cu_seqlens"].tolist()[:5] == [0, 1, 3, 4, 5]
    assert batch.columns["decoder_position_ids"][0, :5].tolist() == [0, 0, 1, 0, 0]
    assert batch.answers().tolist() == [0, 1, 2, 3]
    assert batch.path_sums(torch.ones(4)).tolist() == [1, 1, 1, 1]
