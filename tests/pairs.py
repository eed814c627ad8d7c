"""A small objective over pairs of documents, with a reference, to test the loop: DPO with a supervised term.

The first document of a row is the better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ingle.adapters import disabled
from ingle.data import TokenDataset
from ingle.data.batch import Batch
from ingle.data.dataset import FlatTokens, Origins, TextGroups
from ingle.data.packing import Sequences
from ingle.data.sampler import SequenceSampler
from ingle.data.types import IGNORE_INDEX
from ingle.models import forward_hidden, through_head
from ingle.objectives import Measure, PackedObjective, StepModule, Sums, Term
from ingle.objectives.token_loss import head_logps
from ingle.parallel import Mesh, call_outside_step

BETA = 0.5
#: A column of floats per token; any name would do.
REFERENCE = "weights"


class _Answers(NamedTuple):
    """The pairs of a micro-batch: indices of documents [P], and sums of each document [D]."""

    chosen: Tensor
    rejected: Tensor
    logps: Tensor
    ratios: Tensor
    tokens: Tensor


class PairLoss(StepModule):
    """``-log sigmoid(beta * difference of log-ratios)`` per pair, and the loss of the chosen answers per token."""

    keeps_dropout = False
    measures = (Measure("rewards/accuracy", "pairs"), Measure("rewards/margin", "pairs"), Measure("never", "pairs"))
    row_measures = ("rewards/accuracy", "logps/chosen")
    terms = (Term("preference", "pairs"), Term("sft", "chosen_tokens", 0.25))

    def counts(self, batch: Batch) -> Mapping[str, float]:
        chosen, _, tokens_D = _pairs(batch)
        return {"pairs": len(chosen), "chosen_tokens": float(tokens_D[chosen].sum())}

    def compute(self, batch: Batch) -> Sums:
        found = self._answers(batch)
        margins_P = BETA * (found.ratios[found.chosen] - found.ratios[found.rejected])
        nothing = found.logps.sum() * 0.0  # differentiable, whatever the batch has
        losses = {"preference": nothing - logsigmoid(margins_P).sum(), "sft": nothing - found.logps[found.chosen].sum()}
        margins_P = margins_P.detach()
        return Sums(losses, {"rewards/accuracy": (margins_P > 0).sum(), "rewards/margin": margins_P.sum()})

    def per_document(self, batch: Batch) -> Tensor:
        found = self._answers(batch)
        margins_P = BETA * (found.ratios[found.chosen] - found.ratios[found.rejected])
        table_DC = found.logps.new_zeros(len(found.logps), 6, dtype=torch.float64)
        one_P = torch.ones_like(margins_P)
        columns = (-logsigmoid(margins_P), one_P, margins_P > 0, one_P, found.logps[found.chosen], one_P)
        table_DC[found.chosen] = torch.stack([column.double() for column in columns], 1)
        return table_DC[: batch.num_documents]

    def log_ratios(self, batch: Batch) -> Tensor:
        return (self.logps(batch) - batch.columns[REFERENCE][0])[batch.next_labels() != IGNORE_INDEX]

    def start_sums(self, batch: Batch) -> Mapping[str, float]:
        return {"preference": math.log(2.0) * self.counts(batch)["pairs"]}

    def logps(self, batch: Batch) -> Tensor:
        """The log-probability of each next token, [N]; 0 without a target."""
        return through_head(self.model, head_logps, forward_hidden(self.model, batch)[0], batch.next_labels())

    def _answers(self, batch: Batch) -> _Answers:
        logps_N = self.logps(batch)
        ratios_N = (logps_N - batch.columns[REFERENCE][0]) * (batch.next_labels() != IGNORE_INDEX)
        chosen, rejected, tokens_D = _pairs(batch)
        return _Answers(chosen, rejected, _by_document(logps_N, batch), _by_document(ratios_N, batch), tokens_D)


def _by_document(values_N: Tensor, batch: Batch) -> Tensor:
    lengths_D = batch.cu_seqlens.diff().long()
    documents_N = torch.repeat_interleave(torch.arange(len(lengths_D)), lengths_D)
    return values_N.new_zeros(len(lengths_D)).index_add(0, documents_N, values_N)


def _pairs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Documents of the pairs in which both have a supervised token, and these tokens by document."""
    tokens_D = _by_document((batch.next_labels() != IGNORE_INDEX).float(), batch)
    groups_D = batch.columns["group_ids"]
    is_pair = (groups_D[1:] == groups_D[:-1]) & (tokens_D[1:] > 0) & (tokens_D[:-1] > 0)
    chosen = is_pair.nonzero()[:, 0]
    return chosen, chosen + 1, tokens_D


class PairObjective(PackedObjective):
    """Adds the log-probabilities of the initial function, and counts what the loop calls."""

    prepares = True
    #: Added to the log-probabilities of the reference.
    shift = 0.0
    #: Makes the model compute its initial function.
    initial: Callable[[], AbstractContextManager[None]]

    def __init__(self, module: PairLoss, *arguments: Any, **options: Any) -> None:
        super().__init__(module, *arguments, **options)
        self.initial = partial(disabled, module.model)
        self.calls: list[tuple[str, Any]] = []

    def collect(self, step: int, relief: Any, sink: Any) -> bool:
        self.calls.append(("collect", step))
        return True

    def prepare(self, parts: Sequence[Batch]) -> Sequence[Batch]:
        assert not torch.is_grad_enabled()
        self.calls.append(("prepare", len(parts)))
        module: Any = self.module
        was_training = module.training
        module.eval()
        prepared = []
        with self.initial():
            for part in parts:
                logps_N = call_outside_step(module, module.logps, part) + self.shift
                prepared.append(replace(part, columns={**part.columns, REFERENCE: logps_N[None]}))
        module.train(was_training)
        return prepared

    def after_step(self, sums: Mapping[str, float], counts: Mapping[str, float]) -> None:
        self.calls.append(("after_step", counts["pairs"]))


def make_dataset(num_rows: int = 12, vocab_size: int = 90, seed: int = 0) -> TokenDataset:
    """Rows of two documents of different lengths; every fourth row has an answer without supervised tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 24, 2 * num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    supervised = np.ones(offsets[-1], bool)
    for document, (start, stop) in enumerate(pairwise(offsets)):
        supervised[start : start + 2 + document % 3] = False
        if document % 8 == 5:
            supervised[start:stop] = False
    origins = Origins()
    origins.extend([f"pairs:{document // 2}" for document in range(len(lengths))])
    ids = rng.integers(3, vocab_size, offsets[-1]).astype(np.int32)
    names = np.arange(len(lengths), dtype=np.int16) % 2
    stats: Any = None
    groups = TextGroups(np.arange(0, len(lengths) + 1, 2), ("chosen", "rejected"), names)
    return TokenDataset(FlatTokens(ids, supervised, offsets, origins), stats, groups)


def rows_of(num_rows: int) -> Sequences:
    """One row per sequence."""
    return Sequences(np.arange(2 * num_rows), np.arange(0, 2 * num_rows + 1, 2), 1, 64)


def make_objective(module: PairLoss, mesh: Mesh, *, batch: int = 8, micro: int = 8, **options: Any) -> PairObjective:
    """The objective over :func:`make_dataset`."""
    dataset = make_dataset()
    sampler = SequenceSampler(rows_of(12), 0, True)
    return PairObjective(
        module, dataset, sampler, global_batch_size=batch, micro_batch_size=micro, mesh=mesh, **options
    )
