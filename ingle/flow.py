"""The program: fine-tunes a model as a config describes, from the data to the report.

Read :func:`finetune` from top to bottom; nearly every line of it calls one package.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ingle import adapters, env, evaluation, inference, models, parallel, planning, quant, stopping
from ingle.assembly import Assembled, assemble, prepare
from ingle.atomic import disk_full_explained
from ingle.config.paths import locate_paths
from ingle.config.run import Run
from ingle.errors import IngleError, RewardError
from ingle.events import Evaluated, Failed, Finished, Progress, Saved, Sink, Started, Step, Warned
from ingle.report.results import Comparison, RunReport, ValidationReport
from ingle.report.run_files import write_report
from ingle.run_evaluation import compare_run, evaluate_before, score_samples
from ingle.sinks import EventsFile, MetricsFile, combine
from ingle.training.checkpoint import Checkpoints, Position, Stateful
from ingle.training.endings import already_finished, interrupted
from ingle.training.folder import RunFolder, with_names
from ingle.training.meter import Meter, peak_memory_bytes
from ingle.training.movement import Movement
from ingle.training.out_of_memory import MemoryRelief
from ingle.training.proof import prove_start
from ingle.training.schedule import learning_rate
from ingle.training.steps import take_step
from ingle.training.validation import Validation
from ingle.wording import plural


def finetune(run: Run, sink: Sink = lambda event: None) -> RunReport:
    """Fine-tunes a model, or resumes where an earlier call stopped.

    Args:
        run: The resolved config.
        sink: Receives the events of the run.

    Returns:
        The content of ``report.json``.

    Raises:
        IngleError: The config, the data or a file is wrong.
        Interrupted: Ctrl-C or SIGTERM ended the run; the next call resumes from its last checkpoint.
    """
    as_given, run = run, locate_paths(run)
    folder, place = RunFolder(Path(run.output)), env.rank_from_environment()
    is_main = place is None or place.rank == 0
    reports = parallel.RankSink(is_main, sink)
    if folder.state(run) == "finished":
        return already_finished(run, folder, reports)
    with (
        stopping.listening(),
        stopping.explained(lambda: str(interrupted(run, folder))),
        folder.locked() if is_main else nullcontext(),
    ):
        if folder.state(run) == "finished":  # by another process in the meantime; from here on the lock is ours
            return already_finished(run, folder, reports)
        sink = combine(MetricsFile(folder.metrics), EventsFile(folder.events), sink)
        reports = parallel.RankSink(is_main, sink)
        try:
            return _finetune(run, as_given, folder, reports)
        except KeyboardInterrupt:
            raise interrupted(run, folder) from None
        except Exception as error:
            reports(Failed(error.message if isinstance(error, IngleError) else f"{type(error).__name__}: {error}"))
            raise


def _finetune(run: Run, as_given: Run, folder: RunFolder, sink: parallel.RankSink) -> RunReport:
    """Makes or resumes the run in a folder that rank 0 has locked."""
    began = time.monotonic()
    parts = assemble(_as_before(run, folder, sink), sink, resumes=folder.last_step() is not None)
    sink.share(parts.mesh)
    run = run.model_copy(update={"objective": parts.run.objective, "adapter": parts.run.adapter})
    parts.mesh.on_main(lambda: _begin(as_given, folder, parts))
    parallel.require_visible(parts.mesh, folder.path)
    parts.objective.load_parts(parts.identity, partial(_open_beside, parts.mesh, sink))
    base = evaluate_before(run, folder, parts, sink) if run.adapter.kind == "none" else None
    try:
        trained = train(run, folder, parts, sink, began)
    finally:
        parts.objective.close()
    ended = time.monotonic()
    _save_result(run, folder, parts, trained.kept_step, sink)
    return _report(run, folder, parts, trained, ended, base, sink)


def _open_beside(mesh: parallel.Mesh, sink: Sink, path: str) -> inference.Opened:
    """Opens a model that is read next to the one that is trained: a teacher, or a reward model."""
    return inference.load(inference.locate(path), device=mesh.device, sink=sink)


def _begin(run: Run, folder: RunFolder, parts: Assembled) -> None:
    folder.begin(run.model_copy(update={"objective": parts.run.objective}))
    folder.save_plan(parts.plan)
    folder.save_ranks(parts.run)


def _as_before(run: Run, folder: RunFolder, sink: Sink) -> Run:
    """Returns a run that shares its work among the ranks as before the interruption, so that it continues bit for bit.

    A run that resumes with another number of ranks or other options of ``parallel`` is planned again.
    """
    former = folder.load_strategy() if folder.state(run) == "started" else None
    if former is None:
        return run
    run = folder.with_ranks(with_names(run, folder.load_run()))
    world_size = 1 if (place := env.rank_from_environment()) is None else place.world_size
    if former.world_size != world_size:
        sink(
            Warned(
                f"The run began on {plural(former.world_size, 'rank')} and resumes on {world_size}: the samples and "
                "their order stay, but sums are rounded in another order.",
                where="parallel.num_processes",
            )
        )
        return run
    return former.settle(run) if folder.load_run().parallel == run.parallel else run


def resume(path: Path, sink: Sink = lambda event: None) -> RunReport:
    """Resumes the run in a folder; see :func:`finetune`."""
    run = RunFolder(path).load_run()
    return finetune(run.model_copy(update={"output": str(path)}), sink)


def plan(run: Run, sink: Sink = lambda event: None) -> planning.Plan:
    """Plans a run; reads the data and the shape of the model, but no weights."""
    return prepare(locate_paths(run), sink).plan


@dataclass(frozen=True, slots=True)
class Trained:
    """The training of a run.

    Attributes:
        position: The position after the last step.
        kept_step: The step whose weights the model has now.
        meter: What was measured.
        validation: The validations; None without.
    """

    position: Position
    kept_step: int
    meter: Meter
    validation: ValidationReport | None


def train(run: Run, folder: RunFolder, parts: Assembled, sink: Sink, began: float) -> Trained:
    """Runs the loop that all objectives, formats and adapters share.

    A signal to any rank ends it after the current step, with a checkpoint; :mod:`ingle.stopping` limits the time that
    this takes. Rewards that fail end it in the same way.

    Args:
        run: The config.
        folder: The run folder.
        parts: The assembled parts of the run.
        sink: Receives the events.
        began: ``time.monotonic()`` at which this process began the run or resumed it, in seconds.

    Raises:
        KeyboardInterrupt: A rank was asked to stop.
        RewardError: Sampled answers cannot be scored.
    """
    plan, mesh, objective = parts.plan, parts.mesh, parts.objective
    recompute = None if plan.strategy.recompute else partial(models.recompute_layers, parts.model, adapters.as_now)
    relief = MemoryRelief(folder.memory, mesh, sink, recompute if models.can_recompute(parts.model) else None)
    score = partial(score_samples, run, parts)
    validation = Validation(run, plan.validate_every, objective, parts.held_out, mesh, relief, score)
    states: dict[str, Stateful] = {"optimizer": parts.optimizer, "objective": objective}
    if kept := adapters.AdapterState(parts.model):
        states["adapter"] = kept
    if parts.imatrix is not None:
        states["imatrix"] = parts.imatrix
    if parts.allocator is not None:
        states["allocator"] = parts.allocator
    movement = Movement(
        parts.optimizer,
        run.optimizer,
        plan.num_steps,
        adapter=run.adapter,
        mesh=mesh,
        idle=objective.module.idle,
    )
    prove = partial(
        prove_start,
        objective=objective,
        mesh=mesh,
        dtype=models.compute_dtype(run.model.dtype, mesh.device),
        has_adapter=run.adapter.kind != "none",
        file=folder.start,
        sink=sink,
    )
    if parts.held_out is not None:
        states["selection"] = validation.selection
    checkpoints = Checkpoints(
        folder, run.train.keep_checkpoints, states, mesh, pins_one=run.train.keep_best or objective.pins_one
    )
    if run.adapter.kind == "none":
        objective.prepare_all(plan.num_steps, lambda done, total: sink(Progress("Reference", done, total)))
    position = Position(0, 0, parts.data_hash)
    latest = checkpoints.latest()
    if latest is not None:
        position = checkpoints.load(latest, parts.data_hash)
    else:
        checkpoints.rehearse(position)
    sink(
        Started(
            run=run.model_dump(mode="json"),
            plan=plan.to_dict(),
            audit=parts.audit(),
            step=position.step,
            num_steps=plan.num_steps,
            resumed_from=str(latest) if latest else None,
            validated=validation.selection.step,
        )
    )
    relief.restore()
    meter = Meter(mesh.device)
    training_began = time.monotonic() - position.train_s
    began -= position.wall_s
    objective.module.train()
    stop, saved, good_step = False, position.step, objective.kept_step(position.step) if latest is not None else None
    failure: RewardError | None = None
    with stopping.deferred():
        while True:
            validated = None
            if not stop and validation.is_due(position.step):
                parts.rounding.prepare(position.step + 1)
                validated = validation.take(position.step)
                stop = validated is None
                if validated is not None:
                    sink(validated)
                    training_began += validated.seconds
                    spent = position.validation_s + validated.seconds
                    position = replace(position, validation_s=spent, wall_s=time.monotonic() - began)
            is_over = stop or position.step == plan.num_steps or validation.selection.should_stop or objective.is_over
            is_due = plan.save_every > 0 and position.step % plan.save_every == 0
            # A run that was stopped after its last step has saved that step without the validation.
            is_new = position.step != saved or (is_over and validated is not None)
            if is_new and (is_due or is_over or validation.kept_step == position.step):
                good_step = objective.kept_step(position.step)
                pinned = good_step if validation.kept_step is None else validation.kept_step
                sink(Saved(position.step, str(checkpoints.save(position, pinned)), "checkpoint"))
                saved = position.step
            if is_over:
                break
            step = position.step + 1
            parts.rounding.prepare(step)
            try:
                stop = not objective.collect(step, relief, sink)
            except RewardError as error:
                stop, failure = True, error
            if stop:
                continue
            if objective.is_over:
                continue
            meter.begin()
            lr = learning_rate(run.optimizer, step, plan.num_steps)
            parts.optimizer.begin(step)
            result = take_step(
                objective,
                parts.optimizer,
                mesh,
                lr=lr,
                seed=run.seed,
                step=step,
                relief=relief,
                prove=prove if step == 1 else None,
                allocator=parts.allocator,
            )
            tokens_per_s = meter.end(result.num_tokens)
            now = time.monotonic()
            num_tokens = position.num_tokens + result.num_tokens
            ranks = mesh.gather((meter.lifetime_peak_bytes, stopping.requested() is not None))
            train_s, wall_s = now - training_began, now - began
            position = replace(position, step=step, num_tokens=num_tokens, train_s=train_s, wall_s=wall_s)
            sink(
                Step(
                    step=step,
                    loss=result.loss,
                    num_tokens=num_tokens,
                    tokens_per_s=tokens_per_s,
                    lr=lr,
                    grad_norm=result.grad_norm,
                    peak_memory_bytes=max(peak for peak, _ in ranks),
                    epoch=objective.epoch,
                    metrics=result.metrics,
                )
            )
            movement.check(step - objective.idle_steps, sink)
            stop = any(is_asked for _, is_asked in ranks)
    if failure is not None:
        raise failure
    if stop:
        raise KeyboardInterrupt  # another rank was asked to stop
    kept_step = position.step if validation.kept_step is None else validation.kept_step
    if validation.kept_step is None and objective.is_over and good_step is not None:
        kept_step = good_step
    if kept_step != position.step:
        checkpoints.load_weights(kept_step, parts.data_hash)
    parts.rounding.prepare(plan.num_steps + 1)  # evaluate the weights that will be served
    position = replace(position, wall_s=time.monotonic() - began)
    return Trained(position, kept_step, meter, validation.report(position.step))


def _save_result(run: Run, folder: RunFolder, parts: Assembled, step: int, sink: Sink) -> None:
    result, mesh, tokenizer = folder.result(run), parts.mesh, parts.tokenizer
    if run.adapter.kind == "none" and parts.plan.strategy.shards_optimizer:
        dtype = models.compute_dtype(run.model.dtype, mesh.device)
        whole = models.meta_model(run.model, torch.device("cpu"), dtype, models.task_of(parts.model))
        models.convert_base(whole, run.model, run.base)
        models.save_sharded(parts.model, whole, tokenizer, result, mesh, source=run.model, finish=quant.settle)
    elif run.adapter.kind == "none":
        quant.settle(parts.model)
        mesh.on_main(lambda: models.save_pretrained(parts.model, tokenizer, result, run.model))
    else:
        adapters.save_adapter(
            parts.model, result, run.adapter, run.model.id, base=run.base, identity=parts.identity, mesh=mesh
        )
        mesh.on_main(lambda: _save_tokenizer(tokenizer, result))
    record = {"base_model_id": run.model.id, "base": run.base, "identity": parts.identity, "mesh": mesh}
    parts.objective.module.save_parts(folder.path, record)
    sink(Saved(step, str(result), "model" if run.adapter.kind == "none" else "adapter"))
    if parts.imatrix is not None:
        entries = parts.imatrix.entries()
        datasets = [source.path for source in run.data.sources]
        chunk_size = run.data.max_seq_len
        mesh.on_main(
            lambda: models.save_importance(
                parts.model, entries, folder.imatrix, datasets=datasets, chunk_size=chunk_size
            )
        )
        sink(Saved(step, str(folder.imatrix), "imatrix"))


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with disk_full_explained(folder):
        tokenizer.save_pretrained(folder)


def _report(
    run: Run,
    folder: RunFolder,
    parts: Assembled,
    trained: Trained,
    ended: float,
    base: evaluation.TaskResult | None,
    sink: parallel.RankSink,
) -> RunReport:
    """Compares base and tuned model on held-out samples, and writes ``report.json`` and ``report.html``."""
    mesh, position, meter = parts.mesh, trained.position, trained.meter
    audit, comparisons = parts.audit(), list[Comparison]()
    if run.task is not None:
        comparisons = compare_run(run, parts, base, sink)
        for comparison in reversed(comparisons):  # the strongest baseline comes last, next to the verdict
            sink(Evaluated(position.step, comparison))
    sink.share(mesh)
    peaks = mesh.gather((meter.peak_bytes, meter.lifetime_peak_bytes, peak_memory_bytes(mesh.device)))
    checked = {
        "predicted_peak_bytes": parts.plan.peak_bytes(on_gpu=mesh.device.type == "cuda"),
        "predicted_tokens_per_s": parts.plan.tokens_per_s,
        "measured_peak_bytes": max(peak for peak, _, _ in peaks) or None,
        "measured_tokens_per_s": meter.tokens_per_s or None,
    }
    summary = {
        "num_steps": position.step,
        "num_tokens": position.num_tokens,
        "tokens_per_s": position.num_tokens / position.train_s if position.train_s else 0.0,
        "train_s": position.train_s,
        "wall_s": position.wall_s + time.monotonic() - ended,
        "peak_memory_bytes": max(max(lifetime, now) for _, lifetime, now in peaks),
        "plan": parts.plan.to_dict() | checked,
        "audit": audit,
        "rounding": parts.rounding.to_dict(),
        "contamination": asdict(parts.contamination) if parts.contamination is not None else None,
        "validation": trained.validation,
    }
    report = mesh.on_main(
        lambda: write_report(
            folder.path, run=run, comparisons=comparisons, summary=summary, metrics_path=folder.metrics
        )
    )
    sink(Saved(position.step, str(folder.report), "report"))
    sink(Finished(position.step, report))
    return report
