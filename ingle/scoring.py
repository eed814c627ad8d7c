"""Evaluates a model, named by a path or a hub id, on one or more tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ingle import evaluation, inference
from ingle.baselines import base_loader, compare_with_rules, has_new_head
from ingle.config.evaluate import TaskConfig, suit_task
from ingle.config.objective import samples_answers
from ingle.config.paths import find_path, locate_paths
from ingle.config.preference_rules import has_reference
from ingle.errors import DataError
from ingle.events import Sink, Warned
from ingle.report.results import Comparison, Summary


def evaluate(
    path_or_id: str,
    tasks: Sequence[TaskConfig],
    sink: Sink = lambda event: None,
    *,
    allow_mismatch: bool = False,
) -> list[Comparison] | list[Summary]:
    """Compares a trained model with its base; a model that was not trained by Ingle is scored alone.

    A model with a task head is compared with the strongest of its baselines.

    Args:
        path_or_id: A run folder, an adapter folder, a model folder or a hub id.
        tasks: The tasks.
        sink: Receives progress and warnings.
        allow_mismatch: Attach the adapter even if the base is not the one that it was trained on.

    Returns:
        One result per task.

    Raises:
        ModelError: The model cannot be found or read.
        AdapterError: The adapter does not fit its base, or was trained on another base.
        DataError: The rows of a task cannot be read.
        EvaluationError: The rows of a task do not suit its metrics or the model.
    """
    source = inference.locate(path_or_id)
    objective = source.objective()
    tasks = [suit_task(task, objective) for task in tasks]
    if has_new_head(objective):
        return _evaluate_head(source, tasks, sink, allow_mismatch=allow_mismatch)
    base = None
    start = _start_of(source, sink)
    if source.original is not None or start is not None:
        # The trained model does not contain what it began with, so the two are opened one after the other.
        before = _open(start or source, "base", sink, base_only=start is None)[0]
        base = [evaluation.run_task(before, task, objective.kind, sink=sink) for task in tasks]
        del before
    tuned, adapted = _open(source, "tuned", sink, allow_mismatch=allow_mismatch)
    if base is None and not adapted:
        return evaluation.evaluate(replace(tuned, name="model"), tasks, objective.kind, sink=sink)
    return evaluation.evaluate(tuned, tasks, objective.kind, base=base or tuned.base(), sink=sink)


def run_alone(path_or_id: str, task: TaskConfig, sink: Sink = lambda event: None) -> evaluation.TaskResult:
    """Runs a task on a model alone, without its base; see :func:`evaluate`."""
    source = inference.locate(path_or_id)
    objective = source.objective()
    tuned, _ = _open(source, "tuned", sink)
    return evaluation.run_task(tuned, suit_task(task, objective), objective.kind, sink=sink)


def _start_of(source: inference.Source, sink: Sink) -> inference.Source | None:
    """Returns the adapter that a run of preferences or rewards began with, which it is compared with; None without."""
    run = source.run
    if run is None or (path := getattr(run.adapter, "path", None)) is None:
        return None
    if not has_reference(run) and not samples_answers(run.objective.kind):
        return None
    folder = Path(find_path(path, run.paths_from))
    if (folder / "adapter_config.json").is_file():
        return replace(source, adapter=folder)
    message = "The adapter that training began with is gone, so the model is compared with its base."
    sink(Warned(message, where=f"adapter.path = {path}"))
    return None


def _open(
    source: inference.Source, name: str, sink: Sink, *, base_only: bool = False, allow_mismatch: bool = False
) -> tuple[evaluation.LoadedModel, bool]:
    """Returns a model as a source of outputs, and whether it has an adapter."""
    opened = inference.load(source, base_only=base_only, allow_mismatch=allow_mismatch, sink=sink)
    longest = inference.longest_document(source, opened)
    made = evaluation.make_source(opened.model, opened.tokenizer, opened.objective, longest, name)
    return made, opened.adapted


def _evaluate_head(
    source: inference.Source, tasks: Sequence[TaskConfig], sink: Sink, *, allow_mismatch: bool
) -> list[Comparison] | list[Summary]:
    """Compares a model with a task head with its baselines, or scores it alone if they are not known."""
    tuned = _open(source, "tuned", sink, allow_mismatch=allow_mismatch)[0]
    objective = source.objective()
    results = [evaluation.run_task(tuned, task, objective.kind, sink=sink) for task in tasks]
    if source.run is not None:
        run = locate_paths(source.run).model_copy(update={"objective": objective})
        try:
            load_base = base_loader(run, tuned.model, tuned.tokenizer, sink=sink)
            return [
                next(iter(compare_with_rules(run, task, result, load_base, sink=sink).values()))
                for task, result in zip(tasks, results, strict=True)
            ]
        except DataError as error:
            sink(Warned(f"The model is not compared with a baseline: {error.message}", where=str(error.where or "")))
    return [evaluation.summarize(result, task) for result, task in zip(results, tasks, strict=True)]
