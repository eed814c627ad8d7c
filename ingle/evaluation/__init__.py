"""Evaluation: whether the tuned model is better than its base, by how much, and whether that could be chance.

Scoring and comparing do not need torch. Reading tasks and running models does; these modules are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ingle.evaluation.comparison import compare, compare_all, summarize
from ingle.evaluation.tasks.task_result import SampleText, TaskResult, load_result, save_result

if TYPE_CHECKING:
    from ingle.evaluation.run.answer_sources import Answer, AnswerSource, LoadedModel, ModelSource
    from ingle.evaluation.run.runner import evaluate, run_task
    from ingle.evaluation.run.task_sources import make_source
    from ingle.evaluation.tasks.samples import TaskSample, check_labels, read_task

__all__ = [
    "Answer",
    "AnswerSource",
    "LoadedModel",
    "ModelSource",
    "SampleText",
    "TaskResult",
    "TaskSample",
    "check_labels",
    "compare",
    "compare_all",
    "evaluate",
    "load_result",
    "make_source",
    "read_task",
    "run_task",
    "save_result",
    "summarize",
]

_LAZY = {
    **dict.fromkeys(("evaluate", "run_task"), "ingle.evaluation.run.runner"),
    **dict.fromkeys(("Answer", "AnswerSource", "LoadedModel", "ModelSource"), "ingle.evaluation.run.answer_sources"),
    "make_source": "ingle.evaluation.run.task_sources",
    **dict.fromkeys(("TaskSample", "check_labels", "read_task"), "ingle.evaluation.tasks.samples"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
