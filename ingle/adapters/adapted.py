"""Changes and describes a model with an adapter: its adapted layers, its trained modules, and the original base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ingle.adapters.lora import LoraLinear
from ingle.adapters.states import BEFORE, Adapted, own_parameters
from ingle.adapters.targets import Selection, unread_layers
from ingle.errors import AdapterError
from ingle.quant.linear import QuantModule
from ingle.wording import plural, some


@dataclass(frozen=True)
class NotAdapted:
    """A frozen module that contains matrices and has no adapter.

    Attributes:
        name: Path of the module.
        class_name: Class of the module.
        parameters: Number of logical weights in its matrices.
    """

    name: str
    class_name: str
    parameters: int


@dataclass(frozen=True)
class AttachReport:
    """What an adapter changed in a model.

    Attributes:
        adapted: Paths of the linear layers with an adapter.
        modules_to_save: Paths of the modules that are trained and saved in full.
        not_adapted: Frozen modules with matrices but without an adapter: embeddings, the output head, routers,
            fused experts, and linear layers that no pattern matched.
        notes: Sentences for the user about anything unexpected.
        trainable_parameters: Number of trained values.
        parameters: Paths of parameters that are trained and saved by themselves, such as biases.
    """

    adapted: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    not_adapted: tuple[NotAdapted, ...]
    notes: tuple[str, ...]
    trainable_parameters: int
    parameters: tuple[str, ...] = ()


def adapt(model: nn.Module, name: str, rank: int, scale: float, dropout: float, **options: Any) -> LoraLinear:
    """Wraps the linear layer ``name`` in a :class:`LoraLinear` that is not yet initialized; see its options."""
    module = model.get_submodule(name)
    base = module.base if isinstance(module, LoraLinear) else module
    lora = LoraLinear(base, rank, scale, dropout, **options)
    lora.train(module.training)
    model.set_submodule(name, lora)
    return lora


def unfreeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Makes all parameters of modules trainable; they may be on the meta device.

    Raises:
        AdapterError: A module is quantized.
    """
    for path, module in _submodules(model, names):
        if isinstance(module, QuantModule):
            raise AdapterError(
                f"{path} is stored as {module.format.name} and cannot be trained in full.",
                where="adapter.trainable_modules",
                fix="leave it out, or set base.format to none",
            )
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)


def keep_initial_values(model: nn.Module, names: tuple[str, ...], parameters: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Keeps a copy of the initial weights of trained modules and parameters, for ``use(model, "off")``.

    Returns:
        Sentences about weights that other modules share.
    """
    kept: set[int] = set()
    found = [(module, key) for _, module in _submodules(model, names) for key in module._parameters]
    found += [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in parameters]
    for module, key in found:
        parameter = module._parameters[key]
        if parameter is not None and id(parameter) not in kept:
            kept.add(id(parameter))
            module.register_buffer(key + BEFORE, parameter.detach().clone(), persistent=False)
    return tuple(
        f"{path} shares its weight with {', '.join(names)}, so it is trained and saved with it."
        for path in tied_modules(model, names)
    )


def tied_modules(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the modules outside ``names`` that share a parameter with one of them."""
    inside = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    return tuple(
        path
        for path, module in model.named_modules()
        if not any(path == name or path.startswith(f"{name}.") for name in names)
        and any(id(p) in inside for p in module.parameters(recurse=False))
    )


def report(model: nn.Module, selection: Selection, notes: tuple[str, ...]) -> AttachReport:
    """Lists the modules with an adapter, and those with matrices but without one."""
    bases = {name + ".base" for name in selection.adapted}
    of_adapter = own_parameters(model)
    not_adapted = []
    for name, module in model.named_modules():
        if name in bases or isinstance(module, Adapted):
            continue
        if isinstance(module, QuantModule):
            count = module.num_weights
        else:
            own = [p for p in module.parameters(recurse=False) if id(p) not in of_adapter]
            count = sum(p.numel() for p in own if p.dim() >= 2 and not p.requires_grad)
        if count:
            not_adapted.append(NotAdapted(name, type(module).__name__, count))
    plain = (nn.Linear, nn.Embedding)
    experts = [
        each
        for each in not_adapted
        if "expert" in each.name.lower() and not isinstance(model.get_submodule(each.name), plain)
    ]
    if experts:
        notes += (
            f"{len(experts)} fused expert weights ({sum(e.parameters for e in experts):,} parameters) "
            "stay frozen without an adapter.",
        )
    for reason, names in _by_reason(selection.left_out).items():
        notes += (
            f"{plural(len(names), 'linear layer')} without an adapter ({some(names)}): {reason}. To adapt them, name "
            "them in adapter.target_modules.",
        )
    for reason, names in _by_reason(unread_layers(model, selection.adapted)).items():
        alike = sorted({name.rpartition(".")[2] for name in names})
        notes += (
            f"Adapted: {', '.join(alike)}; {reason}. If PEFT is to read the adapter, leave them out of "
            "adapter.target_modules.",
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AttachReport(
        selection.adapted,
        selection.modules_to_save,
        tuple(not_adapted),
        tuple(dict.fromkeys(notes)),
        trainable,
        selection.parameters,
    )


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return found


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """Returns every adapted layer by its path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns name and parameter of everything that is trained; a shared parameter once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _submodules(model: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for name in names:
        yield from model.get_submodule(name).named_modules(prefix=name)
