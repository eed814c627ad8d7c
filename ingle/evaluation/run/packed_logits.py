"""Runs a task head over documents of any lengths, packed without padding.

Legend: D documents, N tokens of a packed row, T tokens of one document, C outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ingle.data import Sample, collate
from ingle.data.batch import Batch
from ingle.evaluation.run.windows import ROW_TOKENS
from ingle.evaluation.statistics import Floats


@torch.no_grad()
def document_logits(
    forward: Callable[[Batch], Tensor],
    documents: Sequence[Sample],
    device: torch.device | str,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Floats]:
    """Returns the logits of each document, in order: [C], or [T, C] of a head over tokens.

    Args:
        forward: Returns the logits of a batch, [D, C] or [1, N, C].
        documents: The documents.
        device: Device of the model.
        on_progress: Called with the number of finished documents and their total.
    """
    found: list[Floats] = [np.empty(0)] * len(documents)
    done = 0
    for row in pack_documents(documents):
        batch = collate([documents[index] for index in row]).to(device)
        logits = forward(batch).double().cpu().numpy()
        bounds = batch.cu_seqlens.tolist()
        for place, (index, (start, end)) in enumerate(zip(row, pairwise(bounds), strict=True)):
            found[index] = logits[place] if logits.ndim == 2 else logits[0, start:end]
        done += len(row)
        on_progress(done, len(documents))
    return found


def pack_documents(documents: Sequence[Sample]) -> Iterator[list[int]]:
    """Yields rows of documents of similar length, at most ``ROW_TOKENS`` tokens unless one document is longer."""
    row: list[int] = []
    num_tokens = 0
    for index in sorted(range(len(documents)), key=lambda index: len(documents[index].input_ids)):
        length = len(documents[index].input_ids)
        if row and num_tokens + length > ROW_TOKENS:
            yield row
            row, num_tokens = [], 0
        row.append(index)
        num_tokens += length
    if row:
        yield row
