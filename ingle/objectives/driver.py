"""What all objectives over packed documents share: the order of the data, its division among ranks, and the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ingle.data.batch import Batch, collate, round_up
from ingle.data.corruption import Corruption
from ingle.data.counters import FIXED_EPOCH, Place
from ingle.data.dataset import TokenDataset
from ingle.data.holdout import HeldOut
from ingle.data.packing import Indices
from ingle.data.sampler import SequenceSampler
from ingle.data.types import Sample
from ingle.objectives.dealing import deal, start_without_labels
from ingle.objectives.interface import Objective, StepModule, Term
from ingle.parallel import Mesh


class DocumentLoss(StepModule):
    """A loss that is a sum over documents, divided by one count.

    Attributes:
        unit: Name of the count, such as ``masked_tokens``.
    """

    unit: str

    @property
    def terms(self) -> Sequence[Term]:
        """The terms of the loss; that of the documents is the first."""
        return (Term("loss", self.unit),)

    def count(self, batch: Batch) -> float:
        """Returns the denominator of the loss, counted in one micro-batch: the number of its labels."""
        return float(batch.num_supervised)

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """Returns the denominator of the loss under its name."""
        return {self.unit: self.count(batch)}


@dataclass(frozen=True, slots=True)
class _Part:
    """A sequence of documents in an epoch."""

    epoch: int
    documents: Indices


class PackedObjective(Objective):
    """Trains on packed documents.

    Args:
        module: Computes the loss.
        dataset: The tokenized documents.
        sampler: Yields the sequences; its state is one counter.
        corrupt: Turns documents into what the model sees and predicts; None leaves them as they are.
        documents_per_sample: Documents that ``corrupt`` joins into one: 2 for a source with its target.
        global_batch_size: Sequences per step.
        micro_batch_size: Sequences per forward pass.
        mesh: The ranks that share a step, and the device of the batches.
        held_out: Documents for validation.

    Attributes:
        corrupt: As given.
    """

    def __init__(
        self,
        module: StepModule,
        dataset: TokenDataset,
        sampler: SequenceSampler,
        *,
        corrupt: Corruption | None = None,
        documents_per_sample: int = 1,
        global_batch_size: int,
        micro_batch_size: int,
        mesh: Mesh,
        held_out: HeldOut | None = None,
    ) -> None:
        self.module = module
        self._dataset = dataset
        self._sampler = sampler
        self.corrupt = corrupt
        self._documents_per_sample = documents_per_sample
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._mesh = mesh
        self._held_out = held_out
        self._counter = 0

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._counter / len(self._sampler)

    def next_batches(self) -> Sequence[Batch]:
        """Returns this rank's micro-batches of the next step; each is one row without padding."""
        sequences = self._sampler.take(self._counter, self._global_batch_size)
        parts = [_Part((self._counter + i) // len(self._sampler), each) for i, each in enumerate(sequences)]
        self._counter += self._global_batch_size
        dealt = deal(parts, self._micro_batch_size, self._mesh)
        return [self._collate(self._dataset, micro_batch, parts[0]) for micro_batch in dealt]

    def held_out_batches(self) -> Iterator[tuple[Indices, Batch]]:
        """Yields this rank's micro-batches of the held-out documents, with the numbers of these.

        Of documents that are joined into one, the number is that of the first.
        """
        if self._held_out is None:
            return
        parts = [_Part(FIXED_EPOCH, sequence) for sequence in self._held_out.sequences]
        for micro_batch in deal(parts, self._micro_batch_size, self._mesh):
            documents = np.concatenate([np.zeros(0, np.int64), *(part.documents for part in micro_batch)])
            batch = self._collate(self._held_out.dataset, micro_batch, parts[0])
            yield documents[:: self._documents_per_sample], batch

    def _collate(self, dataset: TokenDataset, parts: Sequence[_Part], other: _Part) -> Batch:
        """Returns a micro-batch; if it has no documents, the start of one of ``other`` without labels."""
        if parts:
            batch = round_up(collate(self._samples(dataset, parts)))
        else:
            first = _Part(other.epoch, other.documents[: self._documents_per_sample])
            batch = start_without_labels(self._samples(dataset, [first])[0])
        return batch.to(self._mesh.device)

    def _samples(self, dataset: TokenDataset, parts: Sequence[_Part]) -> Sequence[Sample]:
        places = [Place(part.epoch, int(document)) for part in parts for document in part.documents]
        samples = [dataset.sample(place.document) for place in places]
        return samples if self.corrupt is None else self.corrupt(samples, places)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counter of the sampler, from which everything random follows."""
        return {"counter": self._counter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the counter of the sampler."""
        self._counter = int(state["counter"])
