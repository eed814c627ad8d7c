"""TensorBoard, when its library is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ingle.env import install_command
from ingle.errors import DependencyError
from ingle.events import Evaluated, Event, Failed, Finished, Started, Step
from ingle.sinks.metrics import record


class TensorBoard:
    """Writes event files that ``tensorboard --logdir`` shows.

    Args:
        folder: Where the event files go; made when the run starts.

    Raises:
        DependencyError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._writer_type: Any = importlib.import_module("tensorboard.summary").Writer
        except ImportError as error:
            raise DependencyError(
                "TensorBoard is not installed.", where="--tensorboard", fix=f"`{install_command('tensorboard')}`"
            ) from error
        self._folder = folder
        self._writer: Any = None

    def __call__(self, event: Event) -> None:
        """Takes an event."""
        match event:
            case Started():
                self._writer = self._writer_type(str(self._folder))
            case Step() if self._writer is not None:
                for name, value in record(event).items():
                    if name != "step" and value is not None:
                        self._writer.add_scalar(f"train/{name}", value, event.step)
            case Evaluated() if self._writer is not None:
                for metric, row in event.report.get("metrics", {}).items():
                    for side in ("base", "tuned"):
                        if row.get(side) is not None:
                            self._writer.add_scalar(f"evaluate/{metric}/{side}", row[side], event.step)
            case Finished() | Failed() if self._writer is not None:
                self._writer.close()
                self._writer = None
            case _:
                pass
