"""Holds out a part of the data, on which the loss is measured during training.

Which side a document is on follows from the content of its group and the seed, not from its place or from other rows.
A group consists of rows with the same prompt, of rows that begin with the same exchange (a conversation that was cut at
several turns), of rows that share a context or the first of two texts, and of near duplicates. The hash of its smallest
key decides for all of them. So rows that are added, removed or moved change nothing for the others, unless they join a
group and become its smallest, which has a chance of one in its size.

Near duplicates are found among the tokens of documents: their trigrams, without those that many documents share, such
as the words of a prompt template. Of answers to compare, only the prompts count: many answers are short and alike, such
as refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ingle.atomic import write_atomically
from ingle.config.data import DataConfig
from ingle.data.counters import GOLDEN, mix
from ingle.data.dataset import TokenDataset
from ingle.data.minhash import NEAR, Hashes, find_candidates, jaccard, sign
from ingle.data.packing import HOLDING_OUT, Indices, Sequences, make_sequences, permutation, permutation_keys
from ingle.data.types import IGNORE_INDEX, Ids
from ingle.errors import CheckpointError, DataError
from ingle.events import Progress, Sink, Warned
from ingle.wording import plural

#: Tokens of a shingle.
_SHINGLE_TOKENS = 3
#: Shingles in more than this share of documents say nothing about them; counted in this many documents.
_COMMON_SHARE, _COUNTED = 0.02, 2048
#: With fewer distinct rows, texts that were split into several documents are divided between the two sides.
_FEW_ROWS = 20
#: Groups that are more than this many times the wanted share are never held out.
_LARGEST = 2
#: With fewer groups, the loss is a rough estimate.
FEW_GROUPS = 8
_STAGE = "Comparing documents"


class HeldOut(NamedTuple):
    """Documents on which the loss is measured.

    Attributes:
        dataset: Contains them, perhaps among others.
        sequences: They, packed.
        documents: int64 [D], their numbers in the dataset, ascending.
        groups: int64 [D], the group of each, from 0 on.
    """

    dataset: TokenDataset
    sequences: Sequences
    documents: Indices
    groups: Indices

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.dataset.lengths[self.documents].sum(dtype=np.int64))

    @property
    def num_groups(self) -> int:
        """Groups of documents, which are independent of one another."""
        return int(self.groups.max()) + 1


def hold_out(
    dataset: TokenDataset,
    data: DataConfig,
    seed: int,
    build: Callable[[DataConfig], TokenDataset],
    sink: Sink = lambda event: None,
) -> tuple[Sequences, HeldOut | None]:
    """Packs the documents to train on and those to validate on.

    Args:
        dataset: All documents, read with ``data``.
        data: ``validation`` and the options of packing.
        seed: Seed of the run.
        build: Reads other sources in the same way; called for ``validation.sources``.
        sink: Receives progress and warnings.

    Returns:
        The sequences to train on, and the held-out documents; None without ``validation``.

    Raises:
        DataError: All rows have the same prompt or repeat one another, so nothing can be held out.
    """
    validation = data.validation
    if validation is None:
        return make_sequences(dataset, data, seed), None
    if validation.share is None:
        own = build(data.model_copy(update={"sources": validation.sources}))
        keys, trained = _telling_keys(own, dataset)
        repeated = int(np.isin(keys, trained).any(1).sum())
        if repeated:
            message = f"{repeated:,} of {len(own):,} validation rows begin like a training row or have its prompt. "
            message += "The loss on them will look better than the model is."
            sink(Warned(message, where="data.validation.sources", count=repeated))
        training, source = make_sequences(dataset, data, seed), own
        documents, groups = np.arange(len(own)), find_groups(own, sink)
    else:
        groups = find_groups(dataset, sink)
        is_held_out = choose(groups, validation.share, seed)
        training, source = make_sequences(dataset, data, seed, np.flatnonzero(~is_held_out)), dataset
        documents, groups = np.flatnonzero(is_held_out), groups[is_held_out]
    _, group_of = np.unique(groups, return_inverse=True)
    found = HeldOut(source, make_sequences(source, data, seed, documents), documents, group_of)
    if found.num_groups < FEW_GROUPS:
        independent = f"{plural(found.num_groups, 'independent group')} of held-out rows"
        sink(Warned(f"Only {independent}: the validation loss is a rough estimate.", where="data.validation"))
    return training, found


def choose(groups: Hashes, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Returns which documents are held out: at least half of the share, even if there are few groups.

    Args:
        groups: uint64 [D], the group of each document, as :func:`find_groups` returns it.
        share: The share of documents to hold out.
        seed: Seed of the choice.

    Returns:
        bool [D].

    Raises:
        DataError: There is only one group.
    """
    keys, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(keys) < 2:
        raise DataError(
            "No rows can be held out for validation: all of them have the same prompt or nearly repeat one another.",
            where="data.validation",
            why=f"{len(groups):,} documents in one group",
            fix="--data.validation=FILE with rows of their own",
        )
    wanted = share * len(groups)
    drawn = (permutation_keys(seed, HOLDING_OUT)(keys) >> np.uint64(11)) * 2.0**-53
    drawn[sizes > max(_LARGEST * wanted, int(sizes.min()))] = np.inf
    order = np.argsort(drawn, kind="stable")
    enough = int(np.searchsorted(np.cumsum(sizes[order]), wanted / 2)) + 1
    count = max(enough, int(np.count_nonzero(drawn < share)))
    eligible = int(np.count_nonzero(np.isfinite(drawn)))
    chosen = np.zeros(len(keys), np.bool_)
    chosen[order[: min(count, eligible, len(keys) - 1)]] = True
    return chosen[group_of]


def find_groups(dataset: TokenDataset, sink: Sink = lambda event: None) -> Hashes:
    """Returns the group of each document, uint64 [D]: the smallest key of the rows that belong together.

    A cached dataset keeps the result on disk.
    """
    memo = None if dataset.memo is None else dataset.memo.with_suffix(".groups.npy")
    if memo is not None:
        with suppress(OSError, ValueError):
            known = np.load(memo)
            if known.dtype == np.uint64 and known.shape == (len(dataset),):
                return np.asarray(known)
    (keys,) = _telling_keys(dataset)
    if dataset.stats.split_documents and len(np.unique(keys[:, 0])) < _FEW_ROWS:
        keys = np.array([[hash_tokens(dataset.sample(i).input_ids)] for i in range(len(dataset))], np.uint64)
    found = unite(keys, np.array(list(find_near(dataset, sink)), np.int64).reshape(-1, 2))
    if memo is not None:
        content = BytesIO()
        np.save(content, found)
        with suppress(OSError, CheckpointError):  # only the next start is slower
            write_atomically(memo, content.getvalue())
    return found


def _telling_keys(*datasets: TokenDataset) -> list[Hashes]:
    """Returns the keys of rows, [D, 2]; [D, 1] if all rows begin alike, such as with a fixed first text."""
    keys = [dataset.row_keys() for dataset in datasets]
    if all((each[:, 1] == keys[0][0, 1]).all() for each in keys):
        return [each[:, :1] for each in keys]
    return keys


def unite(keys: Hashes, pairs: Indices) -> Hashes:
    """Returns the smallest key of each document's group.

    Args:
        keys: uint64 [D, K]; documents that share a key belong together.
        pairs: int64 [P, 2], further documents that belong together.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    distinct, place = np.unique(keys, return_inverse=True)
    place = place.reshape(keys.shape)
    links = np.concatenate([place[:, [0, column]] for column in range(1, keys.shape[1])] + [place[:, 0][pairs]])
    matrix = coo_array((np.ones(len(links), np.bool_), (links[:, 0], links[:, 1])), shape=(len(distinct),) * 2)
    _, group_of = connected_components(matrix, directed=False)
    _, first = np.unique(group_of, return_index=True)  # keys ascend, so the first is the smallest
    united: Hashes = distinct[first[group_of[place[:, 0]]]]
    return united


def find_near(dataset: TokenDataset, sink: Sink) -> Iterator[tuple[int, int]]:
    """Yields pairs of near duplicates; only signatures of all documents are kept in memory."""
    compared = _find_compared(dataset)
    shingles_of = _distinctive_shingles(dataset, compared)
    places: list[int] = []

    def read() -> Iterator[Hashes]:
        for number, i in enumerate(compared.tolist()):
            if number % _COUNTED == 0:
                sink(Progress(_STAGE, i, len(dataset)))
            own = shingles_of(i)
            if len(own):
                places.append(i)
                yield own
        sink(Progress(_STAGE, len(dataset), len(dataset)))

    signatures = sign(read(), len(compared))[: len(places)]
    candidates = find_candidates(signatures)
    rows, columns = np.nonzero(candidates != np.arange(len(places), dtype=np.int32)[:, None])
    for row, other in np.unique(np.stack([rows, candidates[rows, columns]], 1), axis=0).tolist():
        one, two = places[row], places[other]
        if jaccard(shingles_of(one), shingles_of(two)) >= NEAR:
            yield one, two


def _find_compared(dataset: TokenDataset) -> Indices:
    """Returns the documents to compare; of answers to one prompt, the first."""
    if dataset.groups is None or not dataset.has_document_column("scores"):
        return np.arange(len(dataset))
    return dataset.groups.offsets[:-1]


def _read_compared(dataset: TokenDataset, i: int) -> Ids:
    """Returns the tokens of a document to compare: its prompt, if it is an answer."""
    sample = dataset.sample(i)
    answer = np.flatnonzero(sample.labels != IGNORE_INDEX)
    if "scores" not in sample.columns or not len(answer) or answer[0] < 2:
        return sample.input_ids
    return sample.input_ids[: answer[0]]


def _distinctive_shingles(dataset: TokenDataset, compared: Indices) -> Callable[[int], Hashes]:
    """Returns a function from a document to its shingles, without those of many documents."""
    # At random, since rows may repeat at even distances.
    drawn = compared[np.sort(permutation(len(compared), 0, HOLDING_OUT)[:_COUNTED])]
    counted = [_shingles(_read_compared(dataset, int(i))) for i in drawn]
    hashes, counts = np.unique(np.concatenate(counted), return_counts=True)
    common = hashes[counts > max(_FEW_ROWS, _COMMON_SHARE * len(counted))]

    @lru_cache(maxsize=_COUNTED)
    def find(i: int) -> Hashes:
        own = _shingles(_read_compared(dataset, i))
        found: Hashes = own[~np.isin(own, common, assume_unique=True)] if len(common) else own
        return found

    return find


def _shingles(ids: npt.NDArray[np.int32]) -> Hashes:
    """Returns the distinct hashes of token trigrams, ascending; of the whole text if it is shorter."""
    size = min(_SHINGLE_TOKENS, len(ids))
    hashes = np.zeros(len(ids) - size + 1, np.uint64)
    for i in range(size):
        hashes = mix(hashes ^ (ids[i : i + len(hashes)].astype(np.uint64) + np.uint64(GOLDEN)))
    return np.unique(hashes)


def hash_tokens(ids: npt.NDArray[np.int32]) -> int:
    """Returns a hash of all tokens in their order."""
    places = np.arange(1, len(ids) + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return int(np.bitwise_xor.reduce(mix(ids.astype(np.uint64) ^ mix(places))))
