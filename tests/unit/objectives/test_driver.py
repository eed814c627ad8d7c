"""Every kind of batch is a pure function of the data: not of ranks, batch sizes, packing or interruptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ingle.config.objective import Mlm, Span
from ingle.data import TokenDataset
from ingle.data.batch import COLUMNS, Batch
from ingle.data.corruption import Corruption, Infilling, Masking, SpanCorruption, Target
from ingle.data.dataset import FlatTokens, Origins
from ingle.data.packing import pack
from ingle.data.sampler import SequenceSampler
from ingle.objectives import PackedObjective, Term
from ingle.objectives.classify import ClassWeights
from ingle.objectives.lm import check_first_tokens
from ingle.objectives.seq2seq import Joining
from ingle.parallel import Mesh
from tests.conftest import make_tokenizer

NUM_DOCUMENTS = 60
ALONE = Mesh(torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer(special=("<mask>", *(f"<extra_id_{k}>" for k in range(30))), bos="<s>")
    made.mask_token = "<mask>"
    return made


#: What makes the batches of each kind.
CORRUPTIONS: dict[str, Callable[[Any], Corruption]] = {
    "sft": lambda tokenizer: check_first_tokens,
    "mlm": lambda tokenizer: Masking(Mlm(kind="mlm", rate=0.4), tokenizer, seed=3, vocab_size=300),
    "span, t5": lambda tokenizer: SpanCorruption(
        Span(kind="span", density=0.4), tokenizer, Target(0), seed=3, max_length=30
    ),
    "span, ul2": lambda tokenizer: SpanCorruption(
        Span(kind="span", style="ul2"), tokenizer, Target(0), seed=3, max_length=30
    ),
    "span, bart": lambda tokenizer: Infilling(
        Span(kind="span", style="bart"), tokenizer, Target(2), seed=3, vocab_size=300
    ),
    "seq2seq": lambda tokenizer: Joining(Target(0)),
    "classify": lambda tokenizer: ClassWeights([1.0, 3.0]),
}
RANDOM = {"mlm", "span, t5", "span, ul2", "span, bart"}


class _Module(torch.nn.Module):
    unit = "tokens"
    terms = (Term("loss", "tokens"),)


def make_dataset() -> TokenDataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 30, NUM_DOCUMENTS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(40, 300, offsets[-1]).astype(np.int32)
    ids[offsets[:-1]] = np.arange(NUM_DOCUMENTS) + 40  # tells documents apart
    supervised = np.ones(len(ids), bool)
    supervised[offsets[:-1]] = False
    origins = Origins()
    origins.extend([f"a:{i}" for i in range(NUM_DOCUMENTS)])
    stats: Any = None
    labels = {"document_labels": rng.integers(0, 2, NUM_DOCUMENTS)}
    return TokenDataset(FlatTokens(ids, supervised, offsets, origins), stats, document_columns=labels)


DATASET = make_dataset()


def make_objectives(
    name: str, tokenizer: Any, *, world_size: int = 1, packing: int | None = 64, batch: int = 8, micro: int = 3
) -> list[PackedObjective]:
    """The objective of each rank."""
    sequences = pack(DATASET.lengths, packing or 30, packing=packing is not None)
    if name == "seq2seq":  # rows of two documents
        row_lengths = DATASET.lengths.reshape(-1, 2).sum(1)
        rows = pack(row_lengths, packing or 64, packing=packing is not None)
        documents, offsets = rows.flat()
        pairs = (documents[:, None] * 2 + np.arange(2)).ravel()
        sequences = type(rows)(pairs, offsets * 2, 1, 64)
    module: Any = _Module()
    return [
        PackedObjective(
            module,
            DATASET,
            SequenceSampler(sequences, 0, True),
            corrupt=CORRUPTIONS[name](tokenizer),
            documents_per_sample=2 if name == "seq2seq" else 1,
            global_batch_size=batch,
            micro_batch_size=micro,
            mesh=replace(ALONE, dist_rank=rank, world_size=world_size),
        )
        for rank in range(world_size)
    ]


def read(batches: Sequence[Batch]) -> list[tuple[Any, ...]]:
    """All columns of every document, in a comparable form."""
    documents = []
    for batch in batches:
        for part in batch.split(10**6):
            if part.num_documents:
                assert part.num_documents == 1
                columns = {name: column for name, column in part.columns.items() if COLUMNS[name].per != "bounds"}
                documents.append(tuple((name, tuple(column.ravel().tolist())) for name, column in columns.items()))
    return documents


def take(objectives: list[PackedObjective], num_documents: int) -> list[tuple[Any, ...]]:
    """The documents of as many whole steps as it takes to see a number of documents."""
    found: list[tuple[Any, ...]] = []
    while len(found) < num_documents:
        turns = zip(*(objective.next_batches() for objective in objectives), strict=True)
        found += read([batch for turn in turns for batch in turn])
    return found


def count(name: str) -> int:
    return NUM_DOCUMENTS // 2 if name == "seq2seq" else NUM_DOCUMENTS


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_documents_do_not_depend_on_ranks_batches_or_packing(name: str, tokenizer: Any) -> None:
    def epoch(**options: Any) -> set[tuple[Any, ...]]:
        objectives = make_objectives(name, tokenizer, **options)
        objectives[0].next_batches()
        length = round(1 / objectives[0].epoch * options.get("batch", 8))
        objectives = make_objectives(name, tokenizer, **(options | {"batch": length}))  # one step is one epoch
        return set(take(objectives, count(name)))

    expected = epoch()
    assert len(expected) == count(name)
    for options in ({"world_size": 2}, {"world_size": 3, "micro": 1}, {"packing": 100, "micro": 9}, {"packing": None}):
        assert epoch(**options) == expected, options


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_resumed_run_sees_the_same_documents(name: str, tokenizer: Any) -> None:
    whole = make_objectives(name, tokenizer)[0]
    for _ in range(4):
        whole.next_batches()
    resumed = make_objectives(name, tokenizer, world_size=2)
    for objective in resumed:
        objective.load_state_dict(whole.state_dict())
    together = read([batch for turn in zip(*(each.next_batches() for each in resumed), strict=True) for batch in turn])
    assert together == read(whole.next_batches())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_epochs_differ_where_something_is_random(name: str, tokenizer: Any) -> None:
    objectives = make_objectives(name, tokenizer, batch=1, micro=1)
    objectives[0].next_batches()
    length = round(1 / objectives[0].epoch)
    objectives = make_objectives(name, tokenizer, batch=length)
    first, second = (set(take(objectives, count(name))) for _ in range(2))
    assert (len(first & second) < len(first) / 2) == (name in RANDOM)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_rank_without_documents_has_the_columns_of_the_others(name: str, tokenizer: Any) -> None:
    ranks = make_objectives(name, tokenizer, world_size=3, batch=1)
    batches = [objective.next_batches()[0] for objective in ranks]
    assert [batch.num_documents > 0 for batch in batches] == [True, False, False]
    assert batches[1].columns.keys() == batches[0].columns.keys() - {"group_ids"}
    assert (batches[1].num_tokens, batches[1].num_supervised) == (0, 0)
