"""The program: fine-tune a model as one config says, from the first byte to the report.

Read :func:`finetune` from top to bottom; every line of it is one package.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ingle import adapters, evaluation, models, planning, quant
from ingle.assembly import Assembled, assemble, prepare
from ingle.atomic import write_atomically
from ingle.config.paths import locate_paths
from ingle.config.run import Run
from ingle.errors import IngleError, Interrupted
from ingle.events import Evaluated, Event, Failed, Finished, Saved, Sink, Started, Step, Warned
from ingle.sinks import MetricsFile, combine
from ingle.training.checkpoint import Checkpoints, Position
from ingle.training.folder import RunFolder
from ingle.training.interrupt import StopRequest, stop_on_signals
from ingle.training.meter import Meter, peak_memory_bytes
from ingle.training.schedule import learning_rate
from ingle.training.steps import take_step


def finetune(run: Run, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Fine-tunes as ``run`` says, or goes on where an earlier call stopped.

    Args:
        run: The resolved config.
        sink: Is told everything that happens.

    Returns:
        The content of ``report.json``.

    Raises:
        IngleError: For every mistake the user can mend.
        Interrupted: When a signal asked to stop; a full checkpoint is then on disk.
    """
    as_typed, run = run, locate_paths(run)
    folder = RunFolder(Path(run.output))
    with folder.locked(), stop_on_signals() as stop:
        if folder.state(run) == "finished":
            return _already_finished(folder, sink)
        sink = combine(MetricsFile(folder.metrics), sink)
        try:
            parts = assemble(run, _stoppable(folder, sink, stop))
            _raise_if_asked_to_stop(folder, stop)
            folder.begin(as_typed)
            base = _evaluate_before(run, folder, parts, sink, stop) if run.adapter.kind == "none" else None
            position = train(run, folder, parts, sink, stop)
            _save_result(run, folder, parts, sink)
            return _report(run, folder, parts, position, base, sink, stop)
        except Exception as error:
            sink(Failed(error.message if isinstance(error, IngleError) else f"{type(error).__name__}: {error}"))
            raise


def resume(path: Path, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Goes on with the run in a folder; see :func:`finetune`."""
    run = RunFolder(path).load_run()
    return finetune(run.model_copy(update={"output": str(path)}), sink)


def plan(run: Run, sink: Sink = lambda event: None) -> planning.Plan:
    """What a run would do and need; reads the data and the model's shape but none of its weights."""
    return prepare(locate_paths(run), sink).plan


def train(run: Run, folder: RunFolder, parts: Assembled, sink: Sink, stop: StopRequest) -> Position:
    """The loop: every objective, every format, every adapter goes through here."""
    the_plan, objective, optimizer = parts.plan, parts.objective, parts.optimizer
    checkpoints = Checkpoints(folder, run.train.keep_checkpoints, parts.imatrix)
    position = Position(0, 0, 0, parts.data_hash)
    latest = checkpoints.latest()
    if latest is not None:
        position = checkpoints.load(latest, optimizer, parts.data_hash)
        objective.load_state_dict({"counter": position.counter})
    else:
        checkpoints.rehearse(optimizer, position)
    sink(
        Started(
            run=run.model_dump(mode="json"),
            plan=the_plan.to_dict(),
            audit=parts.audit(),
            step=position.step,
            num_steps=the_plan.num_steps,
            resumed_from=str(latest) if latest else None,
        )
    )
    meter = Meter(parts.mesh.device)
    began = time.monotonic() - position.seconds
    parts.model.train()
    while position.step < the_plan.num_steps:
        step = position.step + 1
        meter.begin()
        lr = learning_rate(run.optim, step, the_plan.num_steps)
        parts.rounding.prepare(step)
        result = take_step(parts.model, objective, optimizer, lr=lr, seed=run.seed, step=step)
        tokens_per_s = meter.end(result.num_tokens)
        counter = int(objective.state_dict()["counter"])
        num_tokens = position.num_tokens + result.num_tokens
        position = Position(step, counter, num_tokens, parts.data_hash, time.monotonic() - began)
        sink(
            Step(
                step=step,
                loss=result.loss,
                num_tokens=num_tokens,
                tokens_per_s=tokens_per_s,
                lr=lr,
                grad_norm=result.grad_norm,
                peak_memory_bytes=peak_memory_bytes(parts.mesh.device),
                epoch=counter / parts.num_sequences,
                metrics=objective.metrics(),
            )
        )
        last = step == the_plan.num_steps
        due = the_plan.save_every > 0 and step % the_plan.save_every == 0
        if due or last or stop:
            sink(Saved(step, str(checkpoints.save(optimizer, position)), "checkpoint"))
        if not last:
            _raise_if_asked_to_stop(folder, stop, f"step {step} of {the_plan.num_steps} is saved")
    parts.rounding.prepare(the_plan.num_steps + 1)  # what is evaluated is what will be served
    return position


def _save_result(run: Run, folder: RunFolder, parts: Assembled, sink: Sink) -> None:
    result = folder.result(run)
    if run.adapter.kind == "none":
        quant.settle(parts.model)
        models.save_pretrained(parts.model, parts.tokenizer, result)
    else:
        adapters.save_adapter(parts.model, result, run.adapter, run.model.id, base=run.base, identity=parts.identity)
        parts.tokenizer.save_pretrained(result)
    sink(Saved(parts.plan.num_steps, str(result), "model" if run.adapter.kind == "none" else "adapter"))
    if parts.imatrix is not None:
        datasets = [source.path for source in run.data.sources]
        models.save_importance(
            parts.model, parts.imatrix.entries(), folder.imatrix, datasets=datasets, chunk_size=run.data.max_seq_len
        )
        sink(Saved(parts.plan.num_steps, str(folder.imatrix), "imatrix"))


def _evaluate_before(
    run: Run, folder: RunFolder, parts: Assembled, sink: Sink, stop: StopRequest
) -> evaluation.TaskResult | None:
    """The base's answers, taken before full fine-tuning overwrites it and kept for a continued run."""
    if run.evaluate is None:
        return None
    task_hash = run.evaluate.model_dump_json()
    if folder.base_evaluation.is_file():
        kept = json.loads(folder.base_evaluation.read_text(encoding="utf-8"))
        if kept["task"] == task_hash:
            return evaluation.TaskResult.from_dict(kept["result"])
    result = evaluation.run_task(
        parts.model, parts.tokenizer, run.evaluate, sink=_stoppable(folder, sink, stop), stage="base"
    )
    write_atomically(folder.base_evaluation, json.dumps({"task": task_hash, "result": result.to_dict()}).encode())
    return result


def _report(
    run: Run,
    folder: RunFolder,
    parts: Assembled,
    position: Position,
    base: evaluation.TaskResult | None,
    sink: Sink,
    stop: StopRequest,
) -> dict[str, Any]:
    """Base against tuned on held-out samples, then ``report.json`` and ``report.html``."""
    comparison = None
    began = time.monotonic()
    if run.evaluate is not None:
        parts.model.eval()
        comparison = evaluation.evaluate_pair(
            parts.model, parts.tokenizer, run.evaluate, sink=_stoppable(folder, sink, stop), base=base
        )
        sink(Evaluated(position.step, comparison))
    summary = {
        "num_steps": position.step,
        "num_tokens": position.num_tokens,
        "tokens_per_s": position.num_tokens / position.seconds if position.seconds else 0.0,
        "train_s": position.seconds,
        "wall_s": position.seconds + time.monotonic() - began,
        "peak_memory_bytes": peak_memory_bytes(parts.mesh.device),
        "plan": parts.plan.to_dict(),
        "audit": parts.audit(),
        "rounding": parts.rounding.to_dict(),
        "contamination": asdict(parts.contamination) if parts.contamination is not None else None,
    }
    report = evaluation.write_report(
        folder.path, run=run, evaluation=comparison, summary=summary, metrics_path=folder.metrics
    )
    sink(Saved(position.step, str(folder.report), "report"))
    sink(Finished(position.step, report))
    return report


def _already_finished(folder: RunFolder, sink: Sink) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(folder.report.read_text(encoding="utf-8"))
    sink(Warned(f"this run is finished; {folder.report.with_suffix('.html')} shows it. --output= starts another."))
    sink(Finished(report.get("num_steps", 0), report))
    return report


def _stoppable(folder: RunFolder, sink: Sink, stop: StopRequest) -> Sink:
    """A sink that ends loading or evaluation when a signal asked for it; what is trained is on disk then."""

    def tell(event: Event) -> None:
        _raise_if_asked_to_stop(folder, stop)
        sink(event)

    return tell


def _raise_if_asked_to_stop(folder: RunFolder, stop: StopRequest, saved: str | None = None) -> None:
    if stop.signal is not None:
        begun = folder.config.is_file()
        saved = saved or ("what is trained so far is saved" if begun else "nothing is trained yet")
        resume = f", or `ingle train --resume {folder.path}`," if begun else ""
        raise Interrupted(
            f"stopped by {stop.signal.name}: {saved}.",
            where=str(folder.path),
            fix=f"run the same command again{resume} to go on",
        )
