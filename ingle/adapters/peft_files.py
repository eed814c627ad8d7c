"""Saves and loads adapters in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT, vLLM and llama.cpp's converter read these files, and adapters trained with PEFT load here.  An adapter trained
with Ingle records the identity of its base and is refused on any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ingle.adapters.adapted import (
    AttachReport,
    adapt,
    keep_initial_values,
    lora_modules,
    report,
    tied_modules,
    unfreeze,
)
from ingle.adapters.head_files import read_padding, write_head_files
from ingle.adapters.identity import BaseIdentity, identify
from ingle.adapters.kind_files import describe_kind, load_values, read_section
from ingle.adapters.kinds import kind_of, module_prefix, select
from ingle.adapters.lora import LoraLinear
from ingle.adapters.merging import can_fold
from ingle.adapters.norms import update_norms
from ingle.adapters.peft_config import CONFIG_FILE, alpha_of, describe_adapter, read_peft_config
from ingle.adapters.peft_tensors import (
    PREFIX,
    WEIGHTS_FILE,
    AdapterOptions,
    Factors,
    Record,
    check_factors,
    check_targets,
    load_module,
    read_record,
    read_tensors,
    sort_tensors,
    write_tensors,
)
from ingle.adapters.rounding import resolve_formats, round_layers
from ingle.adapters.states import adapted_modules, own_parameters
from ingle.adapters.targets import Selection
from ingle.atomic import write_atomically
from ingle.config.adapter import SUBTRACTING, Init, LowRankAdapter
from ingle.config.adapter_kinds import Adapter
from ingle.config.base import BaseConfig
from ingle.errors import AdapterError
from ingle.kernels.layers.lora import spread
from ingle.parallel import Mesh, copy_rows, trained_parameters
from ingle.quant.linear import QuantLinear
from ingle.wording import some


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: Adapter,
    base_model_id: str,
    *,
    base: BaseConfig | None = None,
    identity: BaseIdentity | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Saves all adapters of a model, and the modules whose own weights were trained.  Each file is written atomically.

    Several ranks gather what is trained, and rank 0 writes it; the model is never assembled.

    An A that is shared within groups is written out for every input, so that any reader of plain LoRA can use it.

    Args:
        model: Model that ``attach`` has prepared.
        folder: Output folder; created if it does not exist.
        adapter: Adapter section that was attached.
        base_model_id: Hub id or folder of the base, for readers of the adapter.
        base: Format of the base.
        identity: Identity of the base; the adapter will be refused on any other base.
        mesh: The ranks of the run, all of which call this; None for one process.

    Raises:
        AdapterError: The model has no adapter.
    """
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    if not own_parameters(model) and (trains_all or not any(p.requires_grad for p in model.parameters())):
        raise AdapterError("This model has no adapter to save.", where=str(folder))
    trained = trained_parameters(model, keep=mesh is None or mesh.is_main, also=own_parameters(model))
    low_rank = adapter if isinstance(adapter, LowRankAdapter) else None
    record = Record(
        adapter=AdapterOptions() if low_rank is None else AdapterOptions.of(low_rank),
        group_sizes={name: module.group_size for name, module in lora_modules(model).items() if module.group_size > 1},
        base=base,
        identity=identity,
        section=adapter if low_rank is None else None,
    )
    write = partial(_write, model, Path(folder), adapter, base_model_id, trained, record)
    write() if mesh is None else mesh.on_main(write)


def _write(
    model: nn.Module,
    folder: Path,
    adapter: Adapter,
    base_model_id: str,
    trained: Mapping[str, Tensor],
    record: Record,
) -> None:
    is_low_rank = isinstance(adapter, LowRankAdapter)
    alone = () if is_low_rank else select(model, adapter).parameters  # type: ignore[arg-type]
    to_save = _modules_to_save(model, alone)
    tensors = {
        f"{module_prefix(adapter)}{name}.{key}": trained[f"{name}.{key}"]
        for name in to_save
        for key, _ in model.get_submodule(name).named_parameters(remove_duplicate=False)
    }
    if isinstance(adapter, LowRankAdapter):
        tensors |= _factors(model, adapter, trained)
        config = describe_adapter(model, adapter, base_model_id, to_save)
    else:
        tensors |= kind_of(adapter).to_file(model, adapter, trained)
        config = describe_kind(model, adapter, base_model_id, to_save)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, tensors, record)
    write_head_files(model, folder)
    write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def _factors(model: nn.Module, adapter: LowRankAdapter, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns A, B and magnitudes under PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for name, module in lora_modules(model).items():
        a, b = trained[f"{name}.lora_a"], trained[f"{name}.lora_b"]
        if adapter.subtracts:
            a = torch.cat([a, trained[f"{name}.initial_a"]])
            b = torch.cat([b, -trained[f"{name}.initial_b"]], dim=1)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.spread(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
        if module.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = trained[f"{name}.magnitude"]
    return tensors


def load_adapter(
    model: nn.Module, folder: str | Path, *, allow_mismatch: bool = False, identity: BaseIdentity | None = None
) -> AttachReport:
    """Loads an adapter folder, attaching its adapters unless the model has them already.

    Everything else is frozen.  An adapter that was trained through the rounding of its merge runs merged.

    Args:
        model: The base, or a model that ``attach`` has prepared for this adapter.
        folder: Adapter folder.
        allow_mismatch: Whether to accept a base that the adapter was not trained on; the report then has a note.
        identity: The identity of the base; computed if None.

    Raises:
        AdapterError: Files are missing or damaged, do not fit the model, belong to another base, or describe another
            kind of adapter.
    """
    folder = Path(folder)
    section = read_section(folder)
    if section is not None:
        return _load_kind(model, section, folder, allow_mismatch, identity)
    config, record = read_peft_config(folder), read_record(folder)
    factors, saved = sort_tensors(read_tensors(folder / WEIGHTS_FILE), model, config, folder)
    unknown = check_targets(model, factors, config, folder)
    existing = lora_modules(model)
    scales = {name: config.scale_of(name, len(found.a)) for name, found in factors.items()}
    _check_existing(model, existing, factors, scales, tuple(saved), record.adapter.init, folder)
    if not existing:
        model.requires_grad_(False)
    for name, found in factors.items():
        module = existing.get(name) or adapt(
            model,
            name,
            len(found.a),
            scales[name],
            config.lora_dropout or 0.0,
            group_size=record.group_sizes.get(name, 1),
            has_magnitude=found.magnitude is not None,
        )
        _copy_factors(module, found, name, folder)
    names = tuple(saved)
    notes: tuple[str, ...] = ()
    read_padding(model, folder)
    if not existing:
        notes = _untie(model, saved)
        unfreeze(model, names)
        notes += keep_initial_values(model, names)
    notes += (*unknown, *check_base(model, record, folder, allow_mismatch, identity))
    for name, state in saved.items():
        load_module(model, name, state, folder)
    if not _is_empty(model):
        update_norms(model)
    if not existing:
        _round_as_trained(model, record)
    return report(model, Selection(tuple(factors), names), notes)


def _load_kind(
    model: nn.Module, section: Adapter, folder: Path, allow_mismatch: bool, identity: BaseIdentity | None
) -> AttachReport:
    """Loads an adapter that is not low-rank into its base."""
    kind = kind_of(section)
    selection = kind.select(model, section)
    model.requires_grad_(False)
    kind.insert(model, section, selection)
    read_padding(model, folder)
    unfreeze(model, selection.modules_to_save)
    notes = keep_initial_values(model, selection.modules_to_save, selection.parameters)
    notes += check_base(model, read_record(folder), folder, allow_mismatch, identity)
    if not _is_empty(model):  # as if training continued: a text that it began with is not at hand
        kind.start(model, section.model_copy(update={"path": str(folder)}), 0, None)
    load_values(model, section, folder)
    return report(model, selection, notes)


def _copy_factors(module: LoraLinear, found: Factors, name: str, folder: Path) -> None:
    """Copies A, B and magnitude of a file into a layer; the second half of the rank is what the layer subtracts."""
    rank = module.rank
    copy_rows(module.lora_a, _gather(found.a[:rank], module, name, folder))
    copy_rows(module.lora_b, found.b[:, :rank])
    if module.initial_a is not None and module.initial_b is not None:
        copy_rows(module.initial_a, found.a[rank:])
        copy_rows(module.initial_b, -found.b[:, rank:])
    if module.magnitude is not None and found.magnitude is not None:
        copy_rows(module.magnitude, found.magnitude)
    module.starts_at_base = module.magnitude is None and not bool(found.b.any())


def _check_existing(
    model: nn.Module,
    existing: Mapping[str, LoraLinear],
    factors: Mapping[str, Factors],
    scales: Mapping[str, float],
    saved: tuple[str, ...],
    init: Init,
    folder: Path,
) -> None:
    """Refuses an adapter other than the one that the model was prepared for."""
    where = str(folder)
    if existing and set(existing) != set(factors):
        raise AdapterError(
            "This adapter changes other modules than adapter.target_modules names.",
            where=where,
            why=f"only in the files: {some(set(factors) - set(existing))}; "
            f"only in the config: {some(set(existing) - set(factors))}",
            fix="set adapter.target_modules to the value that the adapter was trained with",
        )
    frozen = sorted(
        name for name in saved if existing and not all(p.requires_grad for p in model.get_submodule(name).parameters())
    )
    if frozen:
        raise AdapterError(
            f"This adapter contains trained weights of {', '.join(frozen)}, which would stay frozen here.",
            where=where,
            fix=f"set adapter.trainable_modules to [{', '.join(frozen)}]",
        )
    apart = tied_modules(model, saved)
    if existing and apart:
        raise AdapterError(
            f"This adapter trained {', '.join(saved)} separately from {', '.join(apart)}, but this model ties their "
            "weights.",
            where=where,
            fix="train it with ensure_weight_tying in PEFT, or start without adapter.path",
        )
    for name, pair in factors.items():
        check_factors(model, name, pair, folder)
        rank, scale, module = len(pair.a), scales[name], existing.get(name)
        if module is None:
            continue
        if (module.magnitude is None) != (pair.magnitude is None):
            raise AdapterError(
                f"This adapter is {'plain LoRA' if pair.magnitude is None else 'DoRA'}, unlike adapter.kind.",
                where=where,
                fix=f"--adapter.kind={'lora' if pair.magnitude is None else 'dora'}",
            )
        if module.initial_a is not None and init not in SUBTRACTING:
            raise AdapterError(
                "This adapter does not subtract the change that it began with, unlike adapter.init.",
                where=where,
                fix="--adapter.init=kaiming",
            )
        rank //= 1 if module.initial_a is None else 2
        if module.rank != rank or abs(module.scale - scale) > 1e-9 * abs(scale):
            raise AdapterError(
                f"This adapter has rank {rank} and scale {scale:g}, but the config asks for rank {module.rank} and "
                f"scale {module.scale:g}.",
                where=where,
                fix=f"set adapter.rank to {rank} and adapter.alpha to {alpha_of(scale, rank, False):g}",
            )


def _gather(lora_a: Tensor, module: LoraLinear, name: str, folder: Path) -> Tensor:
    """Returns A with one column for each group, given A with one column for each input."""
    gathered = lora_a[:, :: module.group_size]
    if not torch.equal(spread(gathered, module.group_size, module.in_features), lora_a):
        raise AdapterError(
            f"The adapter of {name} is not constant within groups of {module.group_size} inputs.",
            where=str(folder / WEIGHTS_FILE),
            why="QA-LoRA shares a column of A within each group, and this adapter was trained without that",
            fix="use --adapter.kind=lora, or start from an adapter of kind qa_lora",
        )
    return gathered


def check_base(
    model: nn.Module, record: Record, folder: Path, allow_mismatch: bool, identity: BaseIdentity | None
) -> tuple[str, ...]:
    """Refuses a base that the adapter was not trained on, or returns a note about it.

    Raises:
        AdapterError: The adapter was trained on another base, and `allow_mismatch` is False.
    """
    if record.identity is None or _is_empty(model):
        return ()
    found = identity or identify(model)
    if found.sha256 == record.identity.sha256:
        return ()
    difference = record.identity.explain_difference(found)
    if not allow_mismatch:
        raise AdapterError(
            "This adapter was trained on another base.",
            where=str(folder),
            why=f"{difference}\nexpected SHA-256 {record.identity.sha256[:12]}..., found {found.sha256[:12]}...",
            fix="use the base that the adapter was trained on, or accept the difference with --allow-mismatch\n"
            "(in a run: --adapter.allow_mismatch)",
        )
    return (f"The adapter was trained on another base: {difference}.",)


def _is_empty(model: nn.Module) -> bool:
    """Returns whether the model is on the meta device; then the code that reads its weights checks them."""
    return any(parameter.is_meta for parameter in model.parameters())


def _round_as_trained(model: nn.Module, record: Record) -> None:
    """Sets merged weights if the adapter was trained through the rounding of its merge."""
    if _is_empty(model):
        return
    if record.adapter.merge_aware is not None:
        round_layers(model, resolve_formats(model, record.adapter.merge_aware.format))
    elif record.adapter.train_rounding:
        folding = {
            name: layer.base.format
            for name, layer in lora_modules(model).items()
            if isinstance(layer.base, QuantLinear) and can_fold(layer.base.format, layer.group_size)
        }
        round_layers(model, folding)


def _untie(model: nn.Module, saved: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, ...]:
    """Gives saved modules weights of their own, as PEFT does.

    A weight is no longer shared with a module that was not trained, nor with one for which the file has another value.

    Returns:
        Notes about weights that are no longer shared.
    """
    names = tuple(saved)
    apart = tied_modules(model, names)
    shared = {id(p) for path in apart for p in model.get_submodule(path).parameters(recurse=False)}
    for name in names:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in shared:
                    setattr(module, key, nn.Parameter(parameter.detach().clone()))
    values: dict[int, Tensor] = {}
    for name, state in saved.items():
        for key, value in state.items():
            path, _, leaf = f"{name}.{key}".rpartition(".")
            module = model.get_submodule(path)
            current = module._parameters.get(leaf)
            if current is not None and not torch.equal(values.setdefault(id(current), value), value):
                setattr(module, leaf, nn.Parameter(current.detach().clone()))
    return tuple(f"{path} keeps its own weight: the adapter trained {', '.join(names)} without it." for path in apart)


def _modules_to_save(model: nn.Module, alone: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the outermost modules whose own weights are all trained, and those that share a weight with them.

    Args:
        model: The model.
        alone: Parameters that are trained by themselves, such as biases.
    """
    names: list[str] = []
    adapters = own_parameters(model) | {id(model.get_parameter(path)) for path in alone}
    for name, module in model.named_modules():
        own = [p for p in module.parameters() if id(p) not in adapters]
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and own and not inside and all(p.requires_grad for p in own) and not adapted_modules(module):
            names.append(name)
    return (*names, *(n for n in tied_modules(model, tuple(names)) if n not in names))
