"""Evaluates a model, named by a path or a hub id, on one or more tasks."""

from __future__ import annotations

from collections.abc import Sequence

from ingle import evaluation, inference
from ingle.config.evaluate import TaskConfig
from ingle.events import Sink
from ingle.report.results import Comparison, Summary


def evaluate(
    path_or_id: str,
    tasks: Sequence[TaskConfig],
    sink: Sink = lambda event: None,
    *,
    allow_mismatch: bool = False,
) -> list[Comparison] | list[Summary]:
    """Compares a trained model with its base; a model that was not trained by Ingle is scored alone.

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
    base = None
    if inference.locate(path_or_id).original is not None:
        # A fully fine-tuned model does not contain its base, so the two are opened one after the other.
        engine = inference.open_model(path_or_id, base_only=True, sink=sink)
        before = _source(engine, "base")
        base = [evaluation.run_task(before, task, sink=sink) for task in tasks]
        del engine, before
    engine = inference.open_model(path_or_id, allow_mismatch=allow_mismatch, sink=sink)
    source = _source(engine, "model")
    if base is None and not engine.adapted:
        return evaluation.evaluate(source, tasks, sink=sink)
    tuned = _source(engine, "tuned")
    return evaluation.evaluate(tuned, tasks, base=base or tuned.base(), sink=sink)


def _source(engine: inference.Engine, name: str) -> evaluation.ModelSource:
    prefix = engine.source.prefix if engine.source is not None else ""
    return evaluation.ModelSource(engine.model, engine.tokenizer, name, prefix=prefix)
