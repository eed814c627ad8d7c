"""What one model did with the samples of a task, ready to be kept on disk and compared later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ingle.atomic import write_atomically
from ingle.evaluation.scorers import Likelihood, Outputs


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, without the row it came from.

    Attributes:
        origin: ``file:line``.
        prompt: As a reader should see it; empty for plain text.
        references: Accepted answers.
    """

    origin: str
    prompt: str
    references: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"origin": self.origin, "prompt": self.prompt, "references": list(self.references)}


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Answers and likelihoods of one model.

    Attributes:
        samples: What was asked.
        outputs: What came of it, in the same order.
        num_unfinished: Answers cut off at ``max_new_tokens``.
        seconds: Wall time.
    """

    samples: tuple[Question, ...]
    outputs: Outputs
    num_unfinished: int = 0
    seconds: float = 0.0

    @property
    def references(self) -> list[tuple[str, ...]]:
        """Accepted answers of each sample."""
        return [sample.references for sample in self.samples]

    def answer(self, index: int) -> str | None:
        """What was answered to a sample; None when no answers were generated."""
        return self.outputs.answers[index] if self.outputs.answers else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """The result that :meth:`to_dict` wrote."""
        return cls(
            samples=tuple(
                Question(sample["origin"], sample["prompt"], tuple(sample["references"])) for sample in data["samples"]
            ),
            outputs=Outputs(
                answers=tuple(data["outputs"]["answers"]),
                likelihoods=tuple(Likelihood(**text) for text in data["outputs"]["likelihoods"]),
            ),
            num_unfinished=data["num_unfinished"],
            seconds=data["seconds"],
        )


def save_result(result: TaskResult, task: str, path: Path) -> None:
    """Writes a result with the task that it answers and a digest.

    Raises:
        CheckpointError: When the disk is full.
    """
    content = result.to_dict()
    write_atomically(path, json.dumps({"task": task, "result": content, "sha256": _digest(content)}).encode())


def load_result(task: str, path: Path) -> TaskResult | None:
    """What :func:`save_result` wrote; None when it answers another task, is damaged, or is not there."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["task"] == task and kept["sha256"] == _digest(kept["result"]):
            return TaskResult.from_dict(kept["result"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
