"""Computes an importance matrix from a text in one pass, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ingle.data import collate
from ingle.evaluation.run.windows import Window, pack_windows
from ingle.models import device_of, forward_hidden
from ingle.quant.imatrix_collector import ImatrixCollector, Importance


@torch.no_grad()
def gather_importance(
    model: Any, windows: Sequence[Window], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Importance]:
    """Returns the statistics of each linear layer's inputs over the windows, by parameter.

    Args:
        model: A model in evaluation mode.
        windows: Windows of the text; all their tokens count, scored or not.
        on_progress: Called with the number of finished windows and their total.
    """
    collector = ImatrixCollector(model)
    done = 0
    try:
        for row in pack_windows(windows):
            batch = collate([window.sample for window in row]).to(device_of(model))
            with collector.opened(batch.num_tokens):
                forward_hidden(model, batch)
            done += len(row)
            on_progress(done, len(windows))
    finally:
        collector.remove()
    return collector.entries()
