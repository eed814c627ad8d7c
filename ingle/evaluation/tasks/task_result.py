"""The outputs of one model for a task, and their file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ingle.atomic import write_atomically
from ingle.evaluation.scorers import Outputs
from ingle.evaluation.statistics import Groups
from ingle.report.results import from_dict, to_dict


@dataclass(frozen=True, slots=True)
class SampleText:
    """A sample as text, without the row it came from.

    Attributes:
        origin: ``file:line``.
        prompt: The prompt as text; empty for plain text.
        references: Accepted answers.
        group: Equal for samples that are not independent (such as questions about one text); None if this one is.
    """

    origin: str
    prompt: str
    references: tuple[str, ...]
    group: int | None = None


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

    @property
    def groups(self) -> Groups | None:
        """The group of each sample, numbered from 0; None if all samples are independent."""
        keys = [
            ("own", i) if sample.group is None else ("group", sample.group) for i, sample in enumerate(self.samples)
        ]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return None if len(numbers) == len(keys) else np.array([numbers[key] for key in keys], dtype=np.int64)

    def answer(self, index: int) -> str | None:
        """Returns the answer to a sample, or its prediction as text; None if there is neither."""
        if self.outputs.answers:
            return self.outputs.answers[index]
        return str(self.outputs.predictions[index]) if self.outputs.predictions else None


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
