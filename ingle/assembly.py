"""Builds the parts of a run from its config: data, plan, quantized base, adapter, objective, optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ingle import adapters, data, env, evaluation, models, objectives, parallel, planning, quant
from ingle.config.adapter import AdapterConfig
from ingle.config.adapter_kinds import PrefixAdapter
from ingle.config.lessons import Facts, find_lessons
from ingle.config.objective import TRAINS, Classify, Tag, rows_of, samples_answers
from ingle.config.policy_rules import reads_reference
from ingle.config.preference_rules import has_reference
from ingle.config.preferences import Reward
from ingle.config.presets import describe_difference
from ingle.config.rules import check
from ingle.config.run import Run
from ingle.events import Sink, Warned
from ingle.models import keep_stored_labels, model_task
from ingle.models.forward.layout import layout_of
from ingle.planning.rates import with_measured_rates
from ingle.quant.imatrix_collector import ImatrixCollector
from ingle.training.calibration import calibrate
from ingle.training.compiling import can_compile, compile_layers, has_kernels
from ingle.training.data_shape import data_shape
from ingle.training.groups import build_optimizer
from ingle.training.meter import describe_gpu, free_bytes, resident_bytes
from ingle.training.model_shape import model_shape
from ingle.training.optim import Optimizer
from ingle.wording import plural


@dataclass(frozen=True, slots=True)
class Prepared:
    """A planned run: its data is tokenized, its model is on the meta device."""

    mesh: parallel.Mesh
    dtype: torch.dtype
    tokenizer: Any
    run: Run
    dataset: data.TokenDataset
    sequences: data.Sequences
    held_out: data.HeldOut | None
    model: models.Model
    plan: planning.Plan
    contamination: data.Contamination | None


@dataclass(frozen=True, slots=True)
class Assembled:
    """All parts of a run, ready for its first step.

    Attributes:
        run: The config, with the names of all labels in its objective.
    """

    run: Run
    mesh: parallel.Mesh
    plan: planning.Plan
    tokenizer: Any
    model: models.Model
    objective: objectives.Objective
    optimizer: Optimizer
    data_hash: str
    held_out: data.HeldOut | None
    fusion: adapters.FusionReport
    rounding: adapters.Rounding
    allocator: adapters.RankAllocator | None
    identity: adapters.BaseIdentity | None
    imatrix: ImatrixCollector | None
    contamination: data.Contamination | None

    def audit(self) -> dict[str, Any]:
        """Returns bytes per dtype and parameters per module class, as plain data."""
        return quant.audit(self.model).to_dict() | {"fusion": asdict(self.fusion)}


def prepare(run: Run, sink: Sink) -> Prepared:
    """Reads the data and the shape of the model, and plans the run; reads no weights.

    The run that is returned has the names of all labels in its objective.
    """
    check(run)
    parallel.check_processes(run.parallel)
    device = parallel.set_up(run.parallel)
    dtype = models.compute_dtype(run.model.dtype, device)
    # Read the task first, to report a mistake in it before hours are spent.
    samples = evaluation.read_task(run.task, run.objective.kind) if run.task is not None else ()
    task_rows = [sample.example for sample in samples]
    search = data.ContaminationSearch(task_rows)
    tokenizer = models.load_tokenizer(run.model)
    objective = data.name_labels(run.data, run.objective)
    if objective != run.objective and run.model.init != "random":
        objective = keep_stored_labels(run.objective, objective, models.stored_task(run.model))
    run = run.model_copy(update={"objective": objective})
    if isinstance(run.objective, Classify | Tag) and run.objective.labels is not None:
        evaluation.check_labels(samples, run.objective.labels)
    task = model_task(run.objective)
    model = models.meta_model(run.model, device, dtype, task)
    models.require_kind(model.config, TRAINS[run.objective.kind], run.objective.kind)
    if (note := models.layout_note(model)) is not None:
        sink(Warned(note, where="model.id"))
    with parallel.local_first("data"):  # process groups come later: this may take hours
        kind = models.kind_of(model.config)
        rows = rows_of(run.objective)
        is_sampled = samples_answers(rows.kind)
        read = data.build_prompts if is_sampled else data.build_dataset
        build = partial(read, tokenizer=tokenizer, objective=rows, model_kind=kind, sink=sink)
        dataset = build(run.data, search=search if task_rows else None)
        how = run.data.model_copy(update={"packing": False}) if is_sampled else run.data
        sequences, held_out = data.hold_out(dataset, how, run.seed, build, sink)
    mesh = parallel.join(device, run.parallel)
    if mesh.world_size > 1:
        _require_same(mesh, run, _data_hash(dataset, held_out))
    contamination = search.result() if task_rows else None
    if contamination is not None and contamination.same_prompt:
        sink(warn_of_contamination(contamination))
    limit = max(run.data.max_seq_len, run.data.max_target_len or 0)  # spans are removed from texts that are longer
    for each in (dataset, *((held_out.dataset,) if held_out is not None else ())):
        models.refuse_tokens_beyond(model, each.largest_id, tokenizer)
        longest, virtual = min(int(each.lengths.max()), limit), getattr(run.adapter, "num_virtual_tokens", 0)
        models.refuse_longer(model, longest, where="data.max_seq_len", virtual=virtual)
    if task.kind == "classify" and models.kind_of(model.config) == "causal":
        is_needed = not (run.objective.kind == "reward" and models.scores_by_position(model))
        if remark := models.choose_padding(model, tokenizer, dataset.last_ids(), is_needed=is_needed):
            sink(Warned(remark, where="model.id"))
    if task.kind == "lm" and models.kind_of(model.config) != "encoder":
        models.end_token_ids(model, tokenizer)  # also refuses an end-of-turn token that the model lacks
    if (difference := describe_difference(run.objective)) is not None:
        sink(Warned(difference, where="objective", is_note=True))
    run = run.model_copy(update={"adapter": _sized(run.adapter, tokenizer)})
    formats = models.choose_formats(model, run.model, run.base)
    shape = model_shape(model, adapters.select(model, run.adapter), formats)
    companions, notes = planning.find_companions(run, models.compute_dtype("auto", device).itemsize)
    shape = replace(shape, adapter_parameters=adapters.count_parameters(model, run.adapter), companions=companions)
    for note in notes:
        sink(Warned(note, where="objective"))
    shares = kind == "causal" and layout_of(model).computes_trees
    found = data_shape(run, dataset, sequences, held_out, shares=shares)
    plan = _plan(run, shape, found, mesh, dtype)
    for lesson in find_lessons(_facts(run, plan, dataset)):
        sink(Warned(lesson.text, where=lesson.where))
    advice = None if is_sampled else planning.find_better_batch(run, len(sequences), plan.num_steps)
    if advice is not None:
        sink(Warned(advice, where="train.global_batch_size"))
    return Prepared(mesh, dtype, tokenizer, run, dataset, sequences, held_out, model, plan, contamination)


def _sized(adapter: AdapterConfig, tokenizer: Any) -> AdapterConfig:
    """Returns a section with as many keys and values as the text has tokens that they begin with."""
    if not isinstance(adapter, PrefixAdapter) or adapter.init_text is None:
        return adapter
    return adapter.model_copy(update={"num_virtual_tokens": len(tokenizer(adapter.init_text)["input_ids"])})


def _originals(run: Run, model: models.Model) -> Callable[[str], torch.Tensor] | None:
    """Returns what reads the weights before they were quantized, if the adapter begins with what they lost."""
    if getattr(run.adapter, "init", None) != "loftq":
        return None
    return models.original_weights(run.model, models.task_of(model))


def _give_text(run: Run, model: models.Model, tokenizer: Any, module: torch.nn.Module) -> None:
    """Gives virtual tokens the text that they begin with, or what the base computes for it."""
    text = getattr(run.adapter, "init_text", None)
    if text is None:
        return
    ids = tokenizer(text)["input_ids"]
    if isinstance(run.adapter, PrefixAdapter):
        with adapters.use(model, "off"):
            adapters.give_keys(model, parallel.call_outside_step(module, models.keys_of, model, ids))
    else:
        adapters.give_text(model, ids)


def _facts(run: Run, plan: planning.Plan, dataset: data.TokenDataset) -> Facts:
    lr = run.optimizer.lr
    assert lr is not None
    tokens = int(dataset.lengths.sum(dtype=np.int64))
    return Facts(run, lr, plan.num_epochs, plan.num_parameters, plan.trainable_parameters, tokens)


def _data_hash(dataset: data.TokenDataset, held_out: data.HeldOut | None) -> str:
    """Returns the digest of all data that the run reads; the split follows from it and from the options."""
    own = dataset.fingerprint()
    if held_out is None or held_out.dataset is dataset:
        return own
    return hashlib.sha256(f"{own} {held_out.dataset.fingerprint()}".encode()).hexdigest()


def _plan(
    run: Run, shape: planning.ModelShape, found: planning.DataShape, mesh: parallel.Mesh, dtype: torch.dtype
) -> planning.Plan:
    """Lets rank 0 plan the run, for the device with the least free memory; all ranks get its plan or its error."""
    on_cpu = mesh.device.type == "cpu"
    local_ranks, ranks = mesh.local_world_size, mesh.world_size
    cores = torch.get_num_threads()
    if ranks == 1 and run.parallel.num_processes is not None:  # the ranks of a dry run
        local_ranks = ranks = run.parallel.num_processes
        cores = max(1, cores // ranks)
    free = min(mesh.gather(free_bytes(mesh.device)))
    plan = None
    with mesh.together():
        if mesh.is_main:
            table = planning.DeviceTable.read()
            device = table.local_cpu(cores) if on_cpu else table.gpu(*describe_gpu(mesh.device))
            problem = planning.Problem(
                run,
                shape,
                found,
                with_measured_rates(device) if ranks == 1 or not on_cpu else device,
                free_bytes=free // local_ranks if on_cpu else free,
                dtype_bytes=dtype.itemsize,
                world_size=ranks,
                local_world_size=local_ranks,
                compiles_kernels=not has_kernels(),
                free_host_bytes=None if on_cpu else free_bytes(torch.device("cpu")),
            )
            plan = planning.make_plan(
                problem,
                process_bytes=resident_bytes() if on_cpu else 0,
                can_compile=can_compile(mesh.device),
                nominal=table.devices["cpu-avx2"],
            )
    planned: planning.Plan = mesh.broadcast(plan)
    return planned


def _require_same(mesh: parallel.Mesh, run: Run, data_hash: str) -> None:
    """Refuses ranks with different code, options or data."""
    options = run.model_dump_json(exclude={"paths_from"})
    parallel.require_same(
        mesh,
        {
            "version of Ingle": env.code_digest(),
            "options": hashlib.sha256(options.encode()).hexdigest()[:12],
            "training data": data_hash[:12],
        },
    )


def warn_of_contamination(found: data.Contamination) -> Warned:
    """Returns the warning that training contains held-out rows."""
    return Warned(
        f"{found.same_prompt:,} of {plural(found.rows, 'held-out prompt')} "
        f"{'is' if found.same_prompt == 1 else 'are'} in the training data, {found.same_row:,} of them with the same "
        f"answer (first {found.pairs[0].first} = {found.pairs[0].second}). The comparison will look better than the "
        "model is.",
        where="evaluate.sources",
        count=found.same_prompt,
    )


def assemble(run: Run, sink: Sink, *, resumes: bool = False) -> Assembled:
    """Builds all parts of a run.

    All modules are created on the meta device, and weights are read into them last, so that modules can be sharded
    before they take memory.

    Args:
        run: The config.
        sink: Receives warnings and progress.
        resumes: Whether a checkpoint will give the adapter its values, so that it reads no data for them.
    """
    parallel.require_launcher(run.parallel)
    ready = prepare(run, sink)
    run = ready.run
    model, plan, mesh = ready.model, ready.plan, ready.mesh
    run = run.model_copy(update={"adapter": adapters.with_steps(run.adapter, plan.num_steps)})
    if parallel.shards(mesh, plan.strategy):
        models.require_shardable(model)
        adapters.require_shardable(run.adapter)
    if run.base.format != "none" and (unquantized := quant.describe_unknown(model)) is not None:
        sink(Warned(unquantized, where="base.format"))
    models.convert_base(model, run.model, run.base)
    selection = adapters.insert(model, run.adapter)
    roles = objectives.insert_roles(model, run)
    if plan.strategy.recompute:
        models.recompute_layers(model, adapters.as_now)
    fusable = adapters.FusionReport(0, {})
    if not (plan.compile and run.train.compile is True):
        fusable = adapters.insert_fused(model, mesh.device)
    context = objectives.Context(
        model,
        ready.tokenizer,
        ready.dataset,
        ready.sequences,
        plan.global_batch_size,
        plan.micro_batch_size,
        mesh,
        ready.held_out,
        plan.num_steps,
        parallel.shards(mesh, plan.strategy),
        roles,
    )
    objective = objectives.build(run, context)
    objective.module.reduces_once = plan.strategy.kind == "zero1"
    layers, head = models.repeated_layers(model), model.get_output_embeddings()
    parallel.wrap(
        objective.module,
        layers,
        mesh,
        plan.strategy,
        dtype=ready.dtype,
        head=head,
        whole=models.dealt_modules(model),
        read=models.read_modules(model),
    )
    if not objective.module.reads_head_in_backward:
        parallel.skip_in_backward(head)
    is_identified = run.adapter.kind != "none" or has_reference(run)
    facts = models.load_weights(
        model,
        run.model,
        mesh.device,
        ready.dtype,
        seed=run.seed,
        sink=sink,
        mesh=mesh,
        offload=plan.strategy.offload,
        describe=adapters.describe if is_identified else None,
        cache=models.QuantizedCache(env.cache_folder() / "quantized", mesh.device),
    )
    identity = adapters.identify(model, facts or None) if is_identified else None
    if isinstance(run.objective, Reward):
        stored = models.ModelTask() if run.model.init == "random" else models.stored_task(run.model)
        objectives.start_scores(model, stored, run.seed)
    _give_text(run, model, ready.tokenizer, objective.module)
    report = adapters.initialize(
        model,
        run.adapter,
        selection,
        seed=run.seed,
        identity=identity,
        keeps_initial=has_reference(run) or reads_reference(run),
        original=_originals(run, model),
        mesh=mesh,
    )
    for note in report.notes:
        sink(Warned(note))
    if isinstance(objective, objectives.PreferenceObjective) and objective.prepares:
        assert identity is not None
        digest = adapters.initial_digest(model, identity)
        objective.cache = objectives.open_cache(digest, model.config, ready.dtype, mesh.device)
    if plan.strategy.shards_base:
        parallel.require_sharded_base(model, plan.strategy.shard_size)
    with adapters.use(model, "off") if models.virtual_length(model) else nullcontext():
        parallel.call_outside_step(objective.module, models.verify, model)
    if models.virtual_length(model):
        parallel.call_outside_step(objective.module, models.verify_virtual_tokens, model)
    sharing = parallel.call_outside_step(objective.module, objectives.settle_sharing, objective, run.objective, model)
    if sharing is not None:
        sink(Warned(sharing, where="objective.share_prompts"))
    fusion = parallel.call_outside_step(objective.module, adapters.enable_fused, model, fusable)
    if not resumes:
        run = run.model_copy(update={"adapter": calibrate(model, run.adapter, objective, mesh, seed=run.seed)})
    hooked = run.train.imatrix or objective.module.uses_hooks
    compiled = plan.compile and not fusion.fused and not hooked and run.optim.rule.kind != "lisa"
    if compiled:
        compile_layers(model)
    if plan.strategy.offload_activations:
        parallel.offload_activations(list(models.decoder_layers(model)))
    imatrix = None
    if run.train.imatrix:
        models.gguf_names(model)  # refuse an architecture without them before the training, not after it
        add = partial(parallel.add_over_ranks, mesh=mesh) if mesh.world_size > 1 else None
        imatrix = ImatrixCollector(model, add=add, is_main=mesh.is_main)
        objective.module.observe = imatrix.opened
    return Assembled(
        run=run,
        mesh=mesh,
        plan=replace(plan, compile=compiled),
        tokenizer=ready.tokenizer,
        model=model,
        objective=objective,
        optimizer=build_optimizer(run, model, layers, mesh, objective.module),
        data_hash=_data_hash(ready.dataset, ready.held_out),
        held_out=ready.held_out,
        fusion=fusion,
        allocator=adapters.make_allocator(model, run.adapter),
        rounding=adapters.Rounding(model, run.adapter, plan.num_steps),
        identity=identity,
        imatrix=imatrix,
        contamination=ready.contamination,
    )
