"""Weights & Biases, when its library is installed."""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from typing import Any

from ingle.env import install_command
from ingle.errors import DependencyError
from ingle.events import Evaluated, Event, Failed, Finished, Started, Step
from ingle.sinks.metrics import record


class Wandb:
    """Sends a run to Weights & Biases; a run that goes on is continued there too.

    Args:
        project: Its project.

    Raises:
        DependencyError: wandb is not installed.
    """

    def __init__(self, project: str) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise DependencyError(
                "Weights & Biases is not installed.", where="--wandb", fix=f"`{install_command('wandb')}`"
            ) from error
        self._project = project
        self._run: Any = None

    def __call__(self, event: Event) -> None:
        """Takes an event."""
        match event:
            case Started():
                folder = Path(event.run["output"])
                self._run = self._wandb.init(
                    project=self._project,
                    name=folder.name,
                    id=_run_id(folder),
                    resume="allow",
                    dir=str(folder),
                    config=event.run,
                )
            case Step() if self._run is not None:
                values = {f"train/{name}": value for name, value in record(event).items() if name != "step"}
                self._run.log(values, step=event.step)
            case Evaluated() if self._run is not None:
                for metric, row in event.report.get("metrics", {}).items():
                    for name in ("base", "tuned", "delta", "p"):
                        self._run.summary[f"evaluate/{metric}/{name}"] = row.get(name)
            case Finished() | Failed() if self._run is not None:
                self._run.finish(exit_code=0 if isinstance(event, Finished) else 1)
                self._run = None
            case _:
                pass


def _run_id(folder: Path) -> str:
    """The run's name on the server, kept in the run folder so that a continued run is the same one."""
    path = folder / "wandb.id"
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")
