"""Evaluation: is the tuned model better than its base, by how much, and could it be chance?"""

from ingle.evaluation.compare import compare, summarize
from ingle.evaluation.report import write_report
from ingle.evaluation.result import Question, TaskResult, load_result, save_result
from ingle.evaluation.runner import evaluate_pair, evaluate_single, run_task
from ingle.evaluation.task import TaskSample, read_task

__all__ = [
    "Question",
    "TaskResult",
    "TaskSample",
    "compare",
    "evaluate_pair",
    "evaluate_single",
    "load_result",
    "read_task",
    "run_task",
    "save_result",
    "summarize",
    "write_report",
]
