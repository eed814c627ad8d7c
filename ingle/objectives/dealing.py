"""Deals the sequences of a step to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy.typing as npt

from ingle.data.batch import COLUMNS, Batch, collate, round_up
from ingle.data.types import Sample
from ingle.parallel import Mesh

_Item = TypeVar("_Item")

#: Tokens of a document that counts for nothing. Funnel, which pools pairs of tokens, cannot compute only two.
_START = 8


def deal(items: Sequence[_Item], micro_batch_size: int, mesh: Mesh) -> list[Sequence[_Item]]:
    """Returns this rank's micro-batches of a step.

    The step is cut into micro-batches in order, whatever the number of ranks, and dealt out like cards: micro-batch
    ``i`` goes to rank ``i % world_size``. All ranks get equally many; the last ones may be empty.

    Args:
        items: All sequences of the step, equal on all ranks.
        micro_batch_size: Sequences per micro-batch; the last one may have fewer.
        mesh: The ranks.
    """
    parts = [items[start : start + micro_batch_size] for start in range(0, len(items), micro_batch_size)]
    parts += [items[:0]] * (-len(parts) % mesh.world_size)
    return parts[mesh.dist_rank :: mesh.world_size]


def start_without_labels(sample: Sample) -> Batch:
    """Returns a batch that counts for nothing, for a rank without data: the start of a document."""
    columns = {name: _start(name, column) for name, column in sample.columns.items()}
    start = Sample(_start("input_ids", sample.input_ids), _start("labels", sample.labels), columns)
    return round_up(collate([start])).without_labels()


def _start(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values[:_START] if COLUMNS[name].per == "token" else values
