"""The outputs of one model for a task, and their file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle.atomic import write_atomically
from ingle.evaluation.scorers import Outputs
from ingle.report.results import from_dict, to_dict


@dataclass(frozen=True, slots=True)
class SampleText:
    """A sample as text, without the row it came from.

    Attributes:
        origin: ``file:line``.
        prompt: The prompt as text; empty for plain text.
        references: Accepted answers.
    """

    origin: str
    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Answers and likelihoods of one model.

    Attributes:
        samples: The samples of the task.
        outputs: Outputs of the model, in the same order.
        num_unfinished: Answers cut off at ``max_new_tokens``.
        seconds: Wall time.
    """

    samples: tuple[SampleText, ...]
    outputs: Outputs
    num_unfinished: int = 0
    seconds: float = 0.0

    @property
    def references(self) -> list[tuple[str, ...]]:
        """Accepted answers of each sample."""
        return [sample.references for sample in self.samples]

    def answer(self, index: int) -> str | None:
        """Returns the answer to a sample; None if no answers were generated."""
        return self.outputs.answers[index] if self.outputs.answers else None


def save_result(result: TaskResult, task: str, path: Path) -> None:
    """Writes a result with its task and a digest.

    Raises:
        CheckpointError: The disk is full.
    """
    content = to_dict(result)
    write_atomically(path, json.dumps({"task": task, "result": content, "sha256": _digest(content)}).encode())


def load_result(task: str, path: Path) -> TaskResult | None:
    """Returns what :func:`save_result` wrote; None if it is missing, damaged or of another task."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["task"] == task and kept["sha256"] == _digest(kept["result"]):
            return from_dict(TaskResult, kept["result"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
