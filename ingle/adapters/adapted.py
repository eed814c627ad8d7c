"""A model with an adapter on it: what it is made of, how it is listed, and how it answers as its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ingle.adapters.lora import LoraLinear
from ingle.adapters.targets import Selection, named_like_experts
from ingle.errors import AdapterError
from ingle.quant.linear import QuantModule
from ingle.wording import some

#: Buffers that keep what a module trained whole held before; they end in this and are never saved.
BEFORE = "_before_training"


@dataclass(frozen=True)
class NotAdapted:
    """A module that holds matrices, is frozen, and got no adapter.

    Attributes:
        name: Its path.
        class_name: Its class.
        parameters: Logical weights in its matrices.
    """

    name: str
    class_name: str
    parameters: int


@dataclass(frozen=True)
class AttachReport:
    """What ``attach`` did.

    Attributes:
        adapted: Paths of the linear maps with an adapter.
        trained_whole: Paths of the modules trained whole.
        not_adapted: Frozen modules with matrices but without an adapter: embeddings, the output head, routers,
            fused experts, and linear maps that no pattern named.
        notes: What else the user should know, in sentences.
        trainable_parameters: Numbers that are trained.
    """

    adapted: tuple[str, ...]
    trained_whole: tuple[str, ...]
    not_adapted: tuple[NotAdapted, ...]
    notes: tuple[str, ...]
    trainable_parameters: int


def adapt(model: nn.Module, name: str, rank: int, scale: float, dropout: float, *, group_size: int = 1) -> LoraLinear:
    """Replaces the linear map called ``name`` by one with an adapter, not yet initialised."""
    module = model.get_submodule(name)
    base = module.base if isinstance(module, LoraLinear) else module
    lora = LoraLinear(base, rank, scale, dropout, group_size=group_size)
    lora.train(module.training)
    model.set_submodule(name, lora)
    return lora


def train_whole(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Makes modules trainable and keeps what they held, for :func:`disabled`.

    Returns:
        Sentences about weights that other modules share.

    Raises:
        AdapterError: When one of them is packed.
    """
    kept: set[int] = set()
    for name in names:
        for path, module in model.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, QuantModule):
                raise AdapterError(
                    f"{path} is held in {module.format.name} and cannot be trained whole.",
                    where="adapter.trainable_modules",
                    fix="leave it out, or set base.format to none",
                )
            for key, parameter in list(module.named_parameters(recurse=False)):
                parameter.requires_grad_(True)
                if id(parameter) not in kept:
                    kept.add(id(parameter))
                    module.register_buffer(key + BEFORE, parameter.detach().clone(), persistent=False)
    return _explain_ties(model, names)


def tied_modules(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Modules outside ``names`` that share a parameter with one of them."""
    inside = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    return tuple(
        path
        for path, module in model.named_modules()
        if not any(path == name or path.startswith(f"{name}.") for name in names)
        and any(id(p) in inside for p in module.parameters(recurse=False))
    )


def _explain_ties(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        f"{path} shares its weight with {', '.join(names)}, so it is trained and saved with it"
        for path in tied_modules(model, names)
    )


def report(model: nn.Module, selection: Selection, notes: tuple[str, ...]) -> AttachReport:
    """Lists what is adapted and what holds matrices and is not."""
    bases = {name + ".base" for name in selection.adapted}
    not_adapted = []
    for name, module in model.named_modules():
        if name in bases or isinstance(module, LoraLinear):
            continue
        if isinstance(module, QuantModule):
            count = module.num_weights
        else:
            own = module.named_parameters(recurse=False)
            count = sum(p.numel() for _, p in own if p.dim() >= 2 and not p.requires_grad)
        if count:
            not_adapted.append(NotAdapted(name, type(module).__name__, count))
    experts = [each for each in not_adapted if "expert" in each.name.lower() and not _is_plain(model, each.name)]
    if experts:
        notes += (
            f"{len(experts)} fused expert weights ({sum(e.parameters for e in experts):,} parameters) "
            "stay frozen without an adapter",
        )
    if selection.left_out:
        notes += (
            f"{len(selection.left_out)} linear maps got no adapter ({some(selection.left_out)}): PEFT would take them "
            "for those of the fused experts and answer otherwise; name them in adapter.target_modules to adapt them",
        )
    mixed_up = named_like_experts(model, selection.adapted)
    if mixed_up:
        alike = sorted({name.rpartition(".")[2] for name in mixed_up})
        notes += (
            f"PEFT takes {', '.join(alike)} for those of the fused experts and answers otherwise; "
            "leave them out of adapter.target_modules if it is to read the adapter",
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AttachReport(
        selection.adapted, selection.modules_to_save, tuple(not_adapted), tuple(dict.fromkeys(notes)), trainable
    )


def _is_plain(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear | nn.Embedding)


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """Path and module of every adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that is trained; a shared parameter once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside it the model answers as its base: adapters are off, modules trained whole hold what they held before."""
    adapters = list(lora_modules(model).values())
    states = [module.enabled for module in adapters]
    swaps = list(_swaps(model))
    for module in adapters:
        module.enabled = False
    for parameter, before in swaps:
        _swap(parameter, before)
    try:
        yield
    finally:
        for parameter, before in swaps:
            _swap(parameter, before)
        for module, state in zip(adapters, states, strict=True):
            module.enabled = state


def _swaps(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for module in model.modules():
        for name, before in module.named_buffers(recurse=False):
            if name.endswith(BEFORE):
                yield module.get_parameter(name.removesuffix(BEFORE)), before


def _swap(parameter: nn.Parameter, before: Tensor) -> None:
    with torch.no_grad():
        parameter.data, before.data = before.data, parameter.data
