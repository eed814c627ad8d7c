"""Adapters on disk, in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT, vLLM and llama.cpp's converter read what is written here, and adapters that PEFT trained load here.  An adapter
that was trained here knows its base, and another one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from ingle.adapters.identity import BaseIdentity, identify
from ingle.adapters.lora import LoraLinear
from ingle.adapters.merging import can_fold
from ingle.adapters.rounding import resolve_formats, round_layers
from ingle.adapters.settings import CONFIG, Settings, alpha_of, make_settings, read_settings
from ingle.adapters.targets import Selection
from ingle.adapters.weights import (
    PREFIX,
    WEIGHTS,
    Record,
    check_factors,
    check_targets,
    load_whole,
    read_record,
    read_tensors,
    sort_tensors,
    write_tensors,
)
from ingle.atomic import write_atomically
from ingle.config.adapter import LoraAdapter, LowRankAdapter, MergeAware, QaLoraAdapter
from ingle.config.base import BaseConfig
from ingle.errors import AdapterError
from ingle.kernels.layers.lora import spread
from ingle.quant.linear import QuantLinear
from ingle.wording import some


def adapter_config(folder: str | Path) -> LoraAdapter | QaLoraAdapter:
    """The adapter section that describes an adapter folder, without reading its weights.

    Raises:
        AdapterError: When the folder holds no adapter, or one that cannot be computed exactly.
    """
    settings = read_settings(Path(folder))
    if settings.lora_alpha <= 0 or settings.lora_dropout == 1:
        raise AdapterError(
            "Training cannot start from this adapter.",
            where=str(Path(folder) / CONFIG),
            why=f"lora_alpha is {settings.lora_alpha:g} and lora_dropout is {settings.lora_dropout or 0:g}",
            fix="use an adapter with lora_alpha above 0 and lora_dropout below 1",
        )
    targets = settings.target_modules
    patterns: Any = tuple(sorted(targets)) if isinstance(targets, list) and targets else "all-linear"
    shared: dict[str, Any] = {
        "rank": settings.r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout or 0.0,
        "rslora": bool(settings.use_rslora),
        "target_modules": patterns,
        "trainable_modules": tuple(settings.modules_to_save or ()),
    }
    special = read_record(folder).adapter
    if special.get("kind") == "qa_lora":
        return QaLoraAdapter(kind="qa_lora", train_rounding=bool(special.get("train_rounding")), **shared)
    aware = special.get("merge_aware")
    return LoraAdapter(merge_aware=None if aware is None else MergeAware(**aware), **shared)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: LowRankAdapter,
    base_model_id: str,
    *,
    base: BaseConfig | None = None,
    identity: BaseIdentity | None = None,
) -> None:
    """Writes all adapters and all modules trained whole; a crash leaves the old file or the new one.

    An A that is shared in groups is written out for every input, so that any reader of plain LoRA takes it.

    Args:
        model: A model that ``attach`` has prepared.
        folder: Made if need be.
        adapter: What it was attached with.
        base_model_id: Hub id or folder of the base, for those who read the adapter.
        base: What the base is held in.
        identity: What the base is; the adapter will be refused on any other.

    Raises:
        AdapterError: When the model holds no adapter.
    """
    modules = lora_modules(model)
    if not modules:
        raise AdapterError("This model has no adapter to save.", where=str(folder))
    whole = _trained_whole(model)
    tensors = {f"{PREFIX}{name}.{key}": tensor for name in whole for key, tensor in _own_state(model, name).items()}
    for name, module in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = module.spread(module.lora_a.detach())
        tensors[f"{PREFIX}{name}.lora_B.weight"] = module.lora_b.detach()
    record = Record(
        adapter=adapter.model_dump(mode="json", include={"kind", "train_rounding", "merge_aware"}),
        group_sizes={name: module.group_size for name, module in modules.items() if module.group_size > 1},
        base=base,
        identity=identity,
    )
    settings = make_settings(model, adapter, base_model_id, whole)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, record)
    write_atomically(folder / CONFIG, (json.dumps(settings, indent=2) + "\n").encode())


def load_adapter(model: nn.Module, folder: str | Path, *, allow_mismatch: bool = False) -> AttachReport:
    """Puts the adapter of a folder on a model: adapters are attached where it has some, and their weights read.

    Adapters that are there already must be those of the folder. Everything else is frozen. An adapter that was
    trained through the rounding of its merge answers merged.

    Args:
        model: The base, or a model that ``attach`` has prepared.
        folder: The adapter.
        allow_mismatch: Take another base than the adapter was trained on; the report then says how far it is.

    Raises:
        AdapterError: When files are missing, damaged, do not fit the model, belong to another base, or describe
            another kind of adapter.
    """
    folder = Path(folder)
    settings, record = read_settings(folder), read_record(folder)
    tensors = read_tensors(folder / WEIGHTS)
    factors, whole = sort_tensors(tensors, model, settings, folder)
    unknown = check_targets(model, factors, settings, folder)
    existing = lora_modules(model)
    _check_existing(model, existing, factors, whole, settings, folder)
    if not existing:
        model.requires_grad_(False)
    for name, (lora_a, lora_b) in factors.items():
        rank = len(lora_a)
        module = existing.get(name) or adapt(
            model,
            name,
            rank,
            settings.scale_of(name, rank),
            settings.lora_dropout or 0.0,
            group_size=record.group_sizes.get(name, 1),
        )
        with torch.no_grad():
            module.lora_a.copy_(_gather(lora_a, module, name, folder))
            module.lora_b.copy_(lora_b)
    names = tuple(whole)
    notes: tuple[str, ...] = ()
    if not existing:
        notes = _untie(model, whole)
        unfreeze(model, names)
        notes += keep_initial_values(model, names)
    notes += (*unknown, *_check_base(model, record, folder, allow_mismatch))
    for name, state in whole.items():
        load_whole(model, name, state, folder)
    if not existing:
        _round_as_trained(model, record)
    return report(model, Selection(tuple(factors), names), notes)


def _check_existing(
    model: nn.Module,
    existing: Mapping[str, LoraLinear],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    whole: Mapping[str, Mapping[str, Tensor]],
    settings: Settings,
    folder: Path,
) -> None:
    """Refuses an adapter that is not the one the model was prepared for."""
    if existing and set(existing) != set(factors):
        raise AdapterError(
            "This adapter sits on other modules than adapter.target_modules names.",
            where=str(folder),
            why=f"only in the files: {some(set(factors) - set(existing))}; "
            f"only in the config: {some(set(existing) - set(factors))}",
            fix="give the target_modules it was trained with",
        )
    frozen = sorted(name for name in whole if existing and not _is_trained(model, name))
    if frozen:
        raise AdapterError(
            f"This adapter holds {', '.join(frozen)}, trained whole, which would stay frozen here.",
            where=str(folder),
            fix=f"set adapter.trainable_modules to [{', '.join(frozen)}]",
        )
    apart = tied_modules(model, tuple(whole))
    if existing and apart:
        raise AdapterError(
            f"This adapter trained {', '.join(whole)} apart from {', '.join(apart)}, and this model ties them.",
            where=str(folder),
            fix="train it with ensure_weight_tying in PEFT, or start without adapter.path",
        )
    for name, (lora_a, _) in factors.items():
        check_factors(model, name, factors[name], folder)
        rank, scale = len(lora_a), settings.scale_of(name, len(lora_a))
        if name in existing and (existing[name].rank != rank or abs(existing[name].scale - scale) > 1e-9 * abs(scale)):
            raise AdapterError(
                f"This adapter has rank {rank} and scale {scale:g}; the config asks for "
                f"rank {existing[name].rank} and scale {existing[name].scale:g}.",
                where=str(folder),
                fix=f"set adapter.rank to {rank} and adapter.alpha to {alpha_of(scale, rank, False):g}",
            )


def _gather(lora_a: Tensor, module: LoraLinear, name: str, folder: Path) -> Tensor:
    """A with one column for each group, from A with one for each input."""
    gathered = lora_a[:, :: module.group_size]
    if not torch.equal(spread(gathered, module.group_size, module.in_features), lora_a):
        raise AdapterError(
            f"The adapter of {name} changes each input on its own, not in groups of {module.group_size}.",
            where=str(folder / WEIGHTS),
            why="QA-LoRA shares a column of A in each group, and this one was trained without",
            fix="--adapter.kind=lora, or start from an adapter of kind qa_lora",
        )
    return gathered


def _check_base(model: nn.Module, record: Record, folder: Path, allow_mismatch: bool) -> tuple[str, ...]:
    """Refuses another base than the one the adapter was trained on, or says how far it is."""
    if record.identity is None or _is_empty(model):
        return ()
    found = identify(model)
    if found.sha256 == record.identity.sha256:
        return ()
    difference = record.identity.explain_difference(found)
    if not allow_mismatch:
        raise AdapterError(
            "This adapter was trained on another base.",
            where=str(folder),
            why=f"{difference}\nSHA-256 {record.identity.sha256[:12]}... there, {found.sha256[:12]}... here",
            fix="open it on the base it was trained on, or take it all the same: --allow-mismatch,\n"
            "in a run --adapter.allow_mismatch",
        )
    return (f"the adapter was trained on another base: {difference}",)


def _is_empty(model: nn.Module) -> bool:
    """Whether the base has no bytes here; whoever reads them elsewhere checks them there."""
    return any(parameter.is_meta for parameter in model.parameters())


def _round_as_trained(model: nn.Module, record: Record) -> None:
    """Lets layers answer with their merged weights where they were trained to."""
    if _is_empty(model):
        return
    aware = record.adapter.get("merge_aware")
    if aware is not None:
        round_layers(model, resolve_formats(model, aware["format"]))
    elif record.adapter.get("train_rounding"):
        folding = {
            name: layer.base.format
            for name, layer in lora_modules(model).items()
            if isinstance(layer.base, QuantLinear) and can_fold(layer.base.format, layer.group_size)
        }
        round_layers(model, folding)


def _untie(model: nn.Module, whole: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, ...]:
    """Gives modules that were trained whole weights of their own, as PEFT does.

    A weight is no longer shared with a module that was not trained, nor with one that the file has another value for.

    Returns:
        Sentences about what is no longer shared.
    """
    names = tuple(whole)
    apart = tied_modules(model, names)
    shared = {id(p) for path in apart for p in model.get_submodule(path).parameters(recurse=False)}
    for name in names:
        for module in model.get_submodule(name).modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in shared:
                    setattr(module, key, nn.Parameter(parameter.detach().clone()))
    values: dict[int, Tensor] = {}
    for name, state in whole.items():
        for key, value in state.items():
            path, _, leaf = f"{name}.{key}".rpartition(".")
            module = model.get_submodule(path)
            held = module._parameters.get(leaf)
            if held is not None and not torch.equal(values.setdefault(id(held), value), value):
                setattr(module, leaf, nn.Parameter(held.detach().clone()))
    return tuple(f"{path} keeps its own weight: the adapter trained {', '.join(names)} without it" for path in apart)


def _trained_whole(model: nn.Module) -> tuple[str, ...]:
    """Outermost modules that are trained whole, and those that share a weight with them."""
    names: list[str] = []
    for name, module in model.named_modules():
        own = [p for key, p in module.named_parameters() if ".lora_" not in f".{key}"]
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and own and not inside and all(p.requires_grad for p in own) and not _holds_lora(module):
            names.append(name)
    return (*names, *(n for n in tied_modules(model, tuple(names)) if n not in names))


def _is_trained(model: nn.Module, name: str) -> bool:
    return all(parameter.requires_grad for parameter in model.get_submodule(name).parameters())


def _holds_lora(module: nn.Module) -> bool:
    return bool(lora_modules(module))


def _own_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: p.detach() for key, p in model.get_submodule(name).named_parameters(remove_duplicate=False)}
