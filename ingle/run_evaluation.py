"""Evaluates the model of a run: before and after training, and on a few samples in between."""

from __future__ import annotations

from ingle import evaluation, parallel
from ingle.assembly import Assembled
from ingle.baselines import base_loader, compare_with_rules, has_new_head
from ingle.config.run import Run
from ingle.events import Sink, Warned
from ingle.report.results import Comparison
from ingle.report.verdicts import few_samples
from ingle.training.folder import RunFolder


def open_source(run: Run, parts: Assembled, name: str) -> evaluation.LoadedModel:
    """Returns the model as a source of outputs, which the ranks share."""
    return evaluation.make_source(
        parts.model,
        parts.tokenizer,
        run.objective,
        run.data.max_seq_len,
        name,
        mesh=parts.mesh,
        in_lockstep=parts.plan.strategy.shards_base,
    )


def score_samples(run: Run, parts: Assembled) -> dict[str, float]:
    """Returns the metrics of the task on the few samples that are answered at each validation."""
    if run.task is None or run.evaluate is None or not run.evaluate.num_validation_samples:
        return {}
    task = run.task.model_copy(update={"num_samples": run.evaluate.num_validation_samples})
    source = open_source(run, parts, "tuned")
    (found,) = parallel.call_outside_step(
        parts.objective.module, lambda: evaluation.evaluate(source, [task], run.objective.kind)
    )
    return {name: row.value for name, row in found.metrics.items() if row.value is not None}


def evaluate_before(
    run: Run, folder: RunFolder, parts: Assembled, sink: parallel.RankSink
) -> evaluation.TaskResult | None:
    """Evaluates the base before full fine-tuning overwrites it; keeps the result for a resumed run."""
    task, mesh = run.task, parts.mesh
    if task is None or has_new_head(run.objective):
        return None
    key = task.model_dump_json()
    result = mesh.on_main(lambda: evaluation.load_result(key, folder.base_evaluation))
    if result is None:
        source = open_source(run, parts, "base")
        result = parallel.call_outside_step(
            parts.objective.module, lambda: evaluation.run_task(source, task, run.objective.kind, sink=sink)
        )
        sink.share(mesh)
        found = result
        mesh.on_main(lambda: evaluation.save_result(found, key, folder.base_evaluation))
    return result


def compare_run(run: Run, parts: Assembled, base: evaluation.TaskResult | None, sink: Sink) -> list[Comparison]:
    """Compares the trained model with its base; a new head with all its baselines, the strongest first.

    The weights of the model may be dropped, to load its base.

    Args:
        run: The run.
        parts: Its parts.
        base: The outputs of the base, if they are known.
        sink: Receives progress and warnings.
    """
    assert run.task is not None
    parts.model.eval()
    tuned, task, kind = open_source(run, parts, "tuned"), run.task, run.objective.kind
    if not has_new_head(run.objective):
        before = tuned.base() if base is None else [base]
        return parallel.call_outside_step(
            parts.objective.module, lambda: evaluation.evaluate(tuned, [task], kind, base=before, sink=sink)
        )
    result = parallel.call_outside_step(
        parts.objective.module, lambda: evaluation.run_task(tuned, task, kind, sink=sink)
    )
    if warning := few_samples(len(result.samples)):
        sink(Warned(warning, where="evaluate"))
    load_base = None
    if not parts.plan.strategy.shards_base:  # then no rank has room for all of it
        load_base = base_loader(run, parts.model, parts.tokenizer, mesh=parts.mesh, sink=sink)
    return list(compare_with_rules(run, task, result, load_base, sink=sink).values())
