"""What a run is made of, put together from its config: data, plan, packed base, adapter, objective, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ingle import adapters, data, evaluation, models, parallel, planning, quant
from ingle.config.rules import check
from ingle.config.run import Run
from ingle.events import Progress, Sink, Warned
from ingle.objectives import LanguageModelling, Objective, Watched
from ingle.quant.imatrix_collector import ImatrixCollector
from ingle.training.census import model_shape
from ingle.training.compiling import can_compile, compile_layers, has_kernels
from ingle.training.groups import parameter_groups
from ingle.training.meter import free_bytes, resident_bytes
from ingle.training.optim import Optimizer
from ingle.wording import plural


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is planned: its data is tokenized, its model has no bytes yet."""

    mesh: parallel.Mesh
    dtype: torch.dtype
    tokenizer: Any
    dataset: data.TokenDataset
    sequences: data.Sequences
    model: models.Model
    plan: planning.Plan
    contamination: data.Contamination | None


@dataclass(frozen=True, slots=True)
class Assembled:
    """Everything a run is made of, ready for its first step."""

    mesh: parallel.Mesh
    plan: planning.Plan
    tokenizer: Any
    model: models.Model
    objective: Objective
    optimizer: Optimizer
    data_hash: str
    num_sequences: int
    fusion: adapters.FusionReport
    rounding: adapters.Rounding
    identity: adapters.BaseIdentity | None
    imatrix: ImatrixCollector | None
    contamination: data.Contamination | None

    def audit(self) -> dict[str, Any]:
        """What the model is made of, as plain data."""
        return quant.audit(self.model).to_dict() | {"fusion": asdict(self.fusion)}


def prepare(run: Run, sink: Sink) -> Prepared:
    """Reads the data and the model's shape and plans the run; of the weights nothing is read."""
    check(run)
    mesh = parallel.start(run.parallel)
    dtype = models.compute_dtype(run.model.dtype, mesh.device)
    contamination = None
    if run.evaluate is not None:
        samples = evaluation.read_task(run.evaluate)  # a mistake in the task must show before hours are spent
        contamination = _find_contamination(run, [sample.example for sample in samples], sink)
    tokenizer = models.load_tokenizer(run.model)
    model = models.meta_model(run.model, mesh.device, dtype)
    dataset = data.build_dataset(run.data, tokenizer, objective=run.objective.kind, sink=sink)
    models.refuse_tokens_beyond(model, dataset.largest_id, tokenizer)
    models.end_token_ids(model, tokenizer)  # an end that the model lacks must show before hours are spent, too
    models.refuse_longer(model, int(dataset.lengths.max()), where="data.max_seq_len")
    sequences = data.make_sequences(dataset, run.data, run.seed)
    plan = planning.make_plan(
        run,
        model_shape(model, adapters.select(model, run.adapter), models.choose_formats(model, run.model, run.base)),
        planning.DataShape(
            num_sequences=len(sequences),
            num_tokens=dataset.num_tokens,
            longest=max(int(dataset.lengths[sequence].sum()) for sequence in sequences),
        ),
        dtype_bytes=dtype.itemsize,
        process_bytes=resident_bytes() if mesh.device.type == "cpu" else 0,
        free_bytes=free_bytes(mesh.device),
        can_compile=can_compile(mesh.device),
        on_gpu=mesh.device.type == "cuda",
        compiles_kernels=not has_kernels(),
    )
    advice = planning.find_better_batch(run, len(sequences), plan.num_steps)
    if advice is not None:
        sink(Warned(advice, where="train.global_batch_size"))
    return Prepared(mesh, dtype, tokenizer, dataset, sequences, model, plan, contamination)


def _find_contamination(run: Run, held_out: Sequence[data.Example], sink: Sink) -> data.Contamination:
    """Counts the held-out rows that training contains, and warns: scores on them say little about new prompts."""
    sink(Progress("compare with held-out rows", 0))
    found = data.find_contamination(data.read_examples(run.data.sources), held_out)
    if found.same_prompt:
        sink(
            Warned(
                f"{found.same_prompt:,} of {plural(found.rows, 'held-out prompt')} "
                f"{'is' if found.same_prompt == 1 else 'are'} in the training data, {found.same_row:,} of them with "
                f"the same answer (first {found.pairs[0].first} = {found.pairs[0].second}): the comparison will look "
                "better than the model is",
                where="evaluate.sources",
                count=found.same_prompt,
            )
        )
    return found


def assemble(run: Run, sink: Sink) -> Assembled:
    """Builds all parts of a run: data, plan, quantized base, adapter, objective, optimizer."""
    ready = prepare(run, sink)
    model, device = ready.model, ready.mesh.device
    models.convert_base(model, run.model, run.base)
    models.load_weights(model, run.model, device, ready.dtype, seed=run.seed, sink=sink)
    models.verify(model)
    attached = adapters.attach(model, run.adapter, seed=run.seed)
    for note in attached.notes:
        sink(Warned(note))
    if run.train.recompute:
        models.recompute_layers(model)
    asked_to_compile = ready.plan.compile and run.train.compile is True
    fusion = adapters.FusionReport(0, {}) if asked_to_compile else adapters.fuse(model)
    compiled = ready.plan.compile and not fusion.fused and not run.train.imatrix
    if compiled:
        compile_layers(model)

    objective: Objective = LanguageModelling(
        ready.dataset,
        data.SequenceSampler(ready.sequences, run.seed, run.data.shuffle),
        global_batch_size=ready.plan.global_batch_size,
        micro_batch_size=ready.plan.micro_batch_size,
        device=device,
    )
    imatrix = None
    if run.train.imatrix:
        models.gguf_names(model)  # an architecture without them is refused now, not after the training
        imatrix = ImatrixCollector(model)
        objective = Watched(objective, imatrix)
    return Assembled(
        mesh=ready.mesh,
        plan=replace(ready.plan, compile=compiled),
        tokenizer=ready.tokenizer,
        model=model,
        objective=objective,
        optimizer=Optimizer(parameter_groups(model, run.adapter, run.optim), run.optim),
        data_hash=ready.dataset.fingerprint(),
        num_sequences=len(ready.sequences),
        fusion=fusion,
        rounding=adapters.Rounding(model, run.adapter, ready.plan.num_steps),
        identity=None if run.adapter.kind == "none" else adapters.identify(model),
        imatrix=imatrix,
        contamination=ready.contamination,
    )
