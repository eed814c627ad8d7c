"""Gathers an importance matrix from a text: one pass, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ingle.data import collate
from ingle.evaluation.likelihood import Window, pack_windows
from ingle.models import forward_hidden, head
from ingle.quant.imatrix_collector import ImatrixCollector, Importance


@torch.no_grad()
def gather_importance(
    model: Any, windows: Sequence[Window], tell: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Importance]:
    """What every linear map of a model is given while it reads the windows, by parameter.

    Args:
        model: In evaluation mode.
        windows: Of the text; all their tokens count, scored or not.
        tell: Called with the number of windows that were read and that of all.
    """
    collector = ImatrixCollector(model)
    done = 0
    try:
        for row in pack_windows(windows):
            batch = collate([window.sample for window in row]).to(head(model).weight.device)
            with collector.opened(batch.num_tokens):
                forward_hidden(model, batch)
            done += len(row)
            tell(done, len(windows))
    finally:
        collector.remove()
    return collector.entries()
