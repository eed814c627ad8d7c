"""Which models are compared when a path is scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ingle import evaluation, inference, scoring
from ingle.config import Source, TaskConfig
from ingle.config.objective import Sft
from ingle.evaluation import ModelSource


@pytest.mark.parametrize(
    ("adapted", "original", "opened", "compared"),
    [
        (True, None, ["tuned"], ("tuned", "base")),
        (False, "before", ["base", "tuned"], ("tuned", ["result of base"])),
        (False, None, ["tuned"], ("model", None)),
    ],
    ids=["adapter", "full fine-tuning", "other model"],
)
def test_a_trained_model_is_compared_with_its_base(
    monkeypatch: pytest.MonkeyPatch, adapted: bool, original: str | None, opened: list[str], compared: Any
) -> None:
    seen: list[str] = []
    results: list[Any] = []

    def load(source: Any, *, base_only: bool = False, allow_mismatch: bool = False, sink: Any) -> Any:
        seen.append("base" if base_only else "tuned")
        return SimpleNamespace(model=None, tokenizer=None, objective=Sft(), adapted=adapted)

    def evaluate(source: ModelSource, tasks: Any, kind: str, *, base: Any = None, sink: Any) -> list[Any]:
        results.append((source.name, base.name if isinstance(base, ModelSource) else base))
        return results

    located = SimpleNamespace(original=original, objective=Sft, run=None)
    monkeypatch.setattr(inference, "locate", lambda path: located)
    monkeypatch.setattr(inference, "load", load)
    monkeypatch.setattr(inference, "longest_document", lambda source, opened: 64)
    monkeypatch.setattr(evaluation, "run_task", lambda source, task, kind, sink: f"result of {source.name}")
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    task = TaskConfig(sources=(Source(path="task.jsonl"),))
    assert scoring.evaluate("runs/x", [task]) == [compared]
    assert seen == opened
