"""Answers to other prompts, whose mean log-ratio estimates the divergence from the reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ingle.data.dataset import TokenDataset
from ingle.data.packing import Sequences, permutation
from ingle.data.types import IGNORE_INDEX, Ids, Sample

#: The stream of the permutation; those of the order of epochs are not negative.
_STREAM = -13
#: Partners that are tried until one has another prompt.
_TRIES = 64


class Mismatches:
    """Gives each document the answer of another one, the same in every epoch.

    The documents lie on a cycle that depends on the data and the seed only, so a step has the same mismatches however
    it is split. An answer goes to the next document on the cycle that has another prompt.

    Args:
        dataset: The documents.
        sequences: Those that take part.
        seed: Decides on the order of the cycle.
        per_sample: 2 where a source and its target are two documents; otherwise 1.

    Source: Ethayarajh et al. 2024, "KTO" (arXiv 2402.01306), section 4.1.
    """

    def __init__(self, dataset: TokenDataset, sequences: Sequences, seed: int, per_sample: int) -> None:
        self._dataset, self._per_sample = dataset, per_sample
        documents = np.sort(np.concatenate([*sequences]))[::per_sample]
        self._cycle = documents[permutation(len(documents), seed, _STREAM)]
        self._places = {int(document): place for place, document in enumerate(self._cycle)}
        self._longest = int(dataset.lengths.max())

    def samples(self, documents: Iterable[int]) -> Iterator[Sample]:
        """Yields the documents with the answers of their partners; the documents of a row must be complete."""
        for document in list(documents)[:: self._per_sample]:
            own = self._dataset.sample(document)
            if self._per_sample == 2:
                yield from (own, self._dataset.sample(self._partner(document, own) + 1))
            else:
                yield self._mix(own, self._dataset.sample(self._partner(document, own)))

    def _partner(self, document: int, own: Sample) -> int:
        place, prompt = self._places[document], self._prompt(own)
        partner = document
        for distance in range(1, min(_TRIES, len(self._cycle)) + 1):
            partner = int(self._cycle[(place + distance) % len(self._cycle)])
            if not np.array_equal(self._prompt(self._dataset.sample(partner)), prompt):
                break
        return partner

    def _prompt(self, sample: Sample) -> Ids:
        return sample.input_ids if self._per_sample == 2 else sample.input_ids[: _first(sample)]

    def _mix(self, own: Sample, other: Sample) -> Sample:
        """Returns the prompt of one document and the answer of another one, no longer than the longest document."""
        at, start = _first(own), _first(other)
        prompt, answer = slice(at), slice(start, start + self._longest - at)
        ids = np.concatenate([own.input_ids[prompt], other.input_ids[answer]])
        labels = np.concatenate([np.full(at, IGNORE_INDEX, np.int32), other.labels[answer]])
        return Sample(ids, labels, own.columns)


def _first(sample: Sample) -> int:
    """Returns the place of the first token of the answer; the length of a document without one."""
    supervised = sample.labels != IGNORE_INDEX
    return int(supervised.argmax()) if supervised.any() else len(supervised)
