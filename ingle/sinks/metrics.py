"""``metrics.jsonl``: one JSON object per step.

A line has left the process when the step's sink call returns.  When a run is resumed after a crash, the steps
that will be computed again are cut off first, together with an incomplete last line, so no step is in it twice.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ingle.atomic import disk_full_explained
from ingle.events import Event, Started, Step


class MetricsFile:
    """Writes ``metrics.jsonl``.

    Nothing is touched before the run has started, so an unusable run folder stays as it is.

    Args:
        path: The file; its folder must exist when the run starts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: Event) -> None:
        """Takes an event."""
        if isinstance(event, Started):
            keep_steps(self.path, event.step)
        elif isinstance(event, Step):
            with disk_full_explained(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record(event)) + "\n")


def record(event: Step) -> dict[str, Any]:
    """A step as it stands in the file; JSON has no NaN and no infinity, so those are null."""
    values: dict[str, Any] = {
        "step": event.step,
        "loss": event.loss,
        "num_tokens": event.num_tokens,
        "tokens_per_s": event.tokens_per_s,
        "lr": event.lr,
        "grad_norm": event.grad_norm,
        "peak_memory_bytes": event.peak_memory_bytes,
        "epoch": event.epoch,
        **event.metrics,
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def keep_steps(path: Path, step: int) -> None:
    """Cuts a metrics file off behind the line of the last step that is at most ``step``.

    Whatever follows, later steps or a torn line, goes; a file that is not there is left alone.

    Args:
        path: The file.
        step: The last step that will not be made again.
    """
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n") or not _is_kept(line, step):
                break
            end += len(line)
        file.truncate(end)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
