"""Attaches an adapter to a model and reports exactly what that changed.

A linear layer that silently gets no adapter is the most common reason why fine-tuning learns nothing.  So this module
alone decides what is frozen, adapted, trained in full or left out, and reports all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ingle.adapters.adapted import (
    AttachReport,
    adapt,
    keep_initial_values,
    lora_modules,
    report,
    unfreeze,
)
from ingle.adapters.identity import BaseIdentity
from ingle.adapters.initialization import set_initial_values
from ingle.adapters.kind_files import load_values
from ingle.adapters.kinds import kind_of, select
from ingle.adapters.norms import start_magnitudes
from ingle.adapters.peft_files import check_base, load_adapter
from ingle.adapters.peft_tensors import read_record
from ingle.adapters.roles import initialize_roles
from ingle.adapters.states import adapted_modules, keep_initial, own_parameters
from ingle.adapters.targets import Selection
from ingle.config.adapter import AdapterConfig, DoraAdapter, LoraAdapter, LowRankAdapter, NoAdapter, QaLoraAdapter
from ingle.config.base import folding_formats
from ingle.errors import AdapterError
from ingle.parallel import Mesh, compute_device, is_sharded
from ingle.planning.selection import matches
from ingle.quant.linear import QuantLinear, QuantModule


def attach(model: nn.Module, adapter: AdapterConfig, *, seed: int) -> AttachReport:
    """Inserts and initializes an adapter; see :func:`insert` and :func:`initialize`.

    Args:
        model: The model, with its weights loaded.
        adapter: What to train.
        seed: Seed of the initialization of A.
    """
    return initialize(model, adapter, insert(model, adapter), seed=seed)


def insert(model: nn.Module, adapter: AdapterConfig) -> Selection:
    """Freezes the base and adds the modules that are trained; with adapter ``none``, everything is trained.

    Args:
        model: The model; it may be on the meta device, before its weights are loaded.
        adapter: What to train.

    Raises:
        AdapterError: A pattern matches nothing, a quantized weight would have to be trained, or a QA-LoRA change
            cannot be folded into a format.
    """
    selection = select(model, adapter)
    if isinstance(adapter, NoAdapter):
        _require_plain_weights(model)
        model.requires_grad_(True)
        return selection
    model.requires_grad_(False)
    if isinstance(adapter, LowRankAdapter):
        _insert_low_rank(model, adapter, selection)
    else:
        kind_of(adapter).insert(model, adapter, selection)
    unfreeze(model, selection.modules_to_save)
    return selection


def count_parameters(model: nn.Module, adapter: AdapterConfig) -> int | None:
    """Counts what an adapter trains, without modules that are trained in full; None for low-rank ones, and for none.

    Args:
        model: The model, on the meta device; it stays as it is.
        adapter: What to train.

    Raises:
        AdapterError: See :func:`insert`.
    """
    if isinstance(adapter, LowRankAdapter | NoAdapter):
        return None
    probe = copy.deepcopy(model)
    selection = insert(probe, adapter)
    whole = {id(p) for name in selection.modules_to_save for p in probe.get_submodule(name).parameters()}
    return sum(p.numel() for p in probe.parameters() if p.requires_grad and id(p) not in whole)


def _insert_low_rank(model: nn.Module, adapter: LowRankAdapter, selection: Selection) -> None:
    sizes = _group_sizes(model, selection.adapted) if isinstance(adapter, QaLoraAdapter) else {}
    for name in selection.adapted:
        rank = rank_of(adapter, name)
        lora = adapt(
            model,
            name,
            rank,
            adapter.scale_at(rank),
            adapter.dropout,
            group_size=sizes.get(name, 1),
            subtracts=adapter.subtracts,
            has_magnitude=isinstance(adapter, DoraAdapter),
        )
        lora.lora_a.requires_grad_(adapter.trains_a)
    _require_ranks(adapter, selection.adapted)


def initialize(
    model: nn.Module,
    adapter: AdapterConfig,
    selection: Selection,
    *,
    seed: int,
    identity: BaseIdentity | None = None,
    keeps_initial: bool = False,
    mesh: Mesh | None = None,
    original: Callable[[str], Tensor] | None = None,
) -> AttachReport:
    """Gives an inserted adapter its initial values, on the device of the base.

    Args:
        model: The model, with its weights loaded.
        adapter: What to train; if it has a ``path``, the adapter starts from that folder.
        selection: What :func:`insert` returned.
        seed: Seed of the initialization of A.
        identity: The identity of the base, if it is known; a sharded base cannot be identified here.
        keeps_initial: Whether ``use(model, "initial")`` will be needed, which costs a copy of what is trained if the
            adapter does not begin at its base.
        mesh: The ranks of the run, all of which call this; None for one process.
        original: Reads the weight of a layer before it was quantized, ``[O, I]``; ``init: loftq`` needs it.

    Raises:
        AdapterError: The adapter to start from does not fit, or a rank is too large for the initial values.
    """
    if isinstance(adapter, NoAdapter):
        return AttachReport((), ("",), (), (), sum(p.numel() for p in model.parameters()))
    for module in adapted_modules(model).values():
        device = compute_device(next((module if module.base is None else module.base).parameters()))
        for tensor in (*module.own_parameters(), *module.buffers(recurse=False)):
            if not is_sharded(tensor):
                tensor.data = tensor.data.to(device)
    if isinstance(adapter, LowRankAdapter):
        loras = lora_modules(model)
        layers = {name: loras[name] for name in selection.adapted}
        # An adapter that continues another one gets its values from the files.
        set_initial_values(model, layers, LoraAdapter() if adapter.path is not None else adapter, seed, mesh, original)
        start_magnitudes(model)
        initialize_roles(layers, seed)
    else:
        kind_of(adapter).start(model, adapter, seed, mesh)
    _freeze_untied(model, selection)
    notes = keep_initial_values(model, selection.modules_to_save, selection.parameters)
    if adapter.path is not None:
        path, allow_mismatch = Path(adapter.path), adapter.allow_mismatch
        if isinstance(adapter, LowRankAdapter):
            notes += load_adapter(model, path, allow_mismatch=allow_mismatch, identity=identity).notes
        else:
            notes += check_base(model, read_record(path), path, allow_mismatch, identity)
            load_values(model, adapter, path)
    starts_at_base = adapter.path is None and all(layer.starts_at_base for layer in adapted_modules(model).values())
    if keeps_initial and not starts_at_base:
        keep_initial(model)
    return report(model, selection, notes)


def rank_of(adapter: LowRankAdapter, name: str) -> int:
    """Returns the rank of the module at path ``name``."""
    return next((rank for pattern, rank in adapter.rank_pattern.items() if matches(name, pattern)), adapter.rank)


def _require_ranks(adapter: LowRankAdapter, names: tuple[str, ...]) -> None:
    for pattern in adapter.rank_pattern:
        if not any(matches(name, pattern) for name in names):
            raise AdapterError(
                f"{pattern!r} matches no adapted layer.",
                where="adapter.rank_pattern",
                why=f"they end in {', '.join(sorted({name.rpartition('.')[2] for name in names}))}",
                fix="name layers that adapter.target_modules selects",
            )


def _freeze_untied(model: nn.Module, selection: Selection) -> None:
    """Freezes weights that shared a trained one until loading found that the files hold two different values."""
    selected = {id(p) for name in selection.modules_to_save for p in model.get_submodule(name).parameters()}
    selected |= {id(model.get_parameter(path)) for path in selection.parameters} | own_parameters(model)
    for parameter in model.parameters():
        if id(parameter) not in selected:
            parameter.requires_grad_(False)


def _group_sizes(model: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    """Returns the group size of each layer's format; a change that is constant within a group folds into it."""
    sizes: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name in names:
        module = model.get_submodule(name)
        module = getattr(module, "base", module)
        format = module.format if isinstance(module, QuantLinear) else None
        if format is not None and format.additive_field is not None:
            sizes[name] = format.additive_field
        else:
            refused[name] = "none" if format is None else format.name
    if refused:
        shown = [f"{name} is stored as {format}" for name, format in list(refused.items())[:3]]
        more = f"\nand {len(refused) - 3} more" if len(refused) > 3 else ""
        raise AdapterError(
            f"QA-LoRA needs formats with a free offset per group, unlike {', '.join(sorted(set(refused.values())))}.",
            where="adapter.kind = qa_lora",
            why="\n".join(shown) + more,
            fix=f"use {' or '.join(folding_formats())}, name other target_modules, or --adapter.kind=lora",
        )
    return sizes


def _require_plain_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantModule):
            raise AdapterError(
                f"{name} is stored as {module.format.name} and cannot be trained.",
                where="adapter.kind = none",
                fix="train an adapter (--adapter.kind=lora), or set base.format to none and start from plain weights",
            )
