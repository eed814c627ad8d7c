"""Uses the weights of sharded units: gathered for a call, for a block, or one unit after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_Result = TypeVar("_Result")
_Module = TypeVar("_Module", bound=nn.Module)


def call_inside(module: nn.Module, function: Callable[..., _Result], *inputs: Any) -> _Result:
    """Calls a function that reads the weights of a unit, with the hooks of a call of the unit.

    Args:
        module: The unit; if it is not sharded, the function is called as it is.
        function: Replaces the unit's ``forward`` in this call.
        inputs: Its arguments, which gradients pass through.
    """
    if not isinstance(module, FSDPModule):
        return function(*inputs)
    module.forward = function
    try:
        result: _Result = module(*inputs)
    finally:
        del module.forward
    return result


def is_unit(module: nn.Module) -> bool:
    """Returns whether the parameters of a module are gathered together when it is called."""
    return isinstance(module, FSDPModule)


def call_outside_step(module: nn.Module, function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Calls a function that uses a sharded model without training it; all ranks do so together.

    Args:
        module: What :func:`wrap` sharded.
        function: It may call the model and any of its modules, whose weights are gathered unit by unit.
        arguments: Its arguments.
    """
    result = call_inside(module, function, *arguments)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # units that keep their weights until the backward pass
    return result


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gathers the weights of one unit while the block runs, outside of a step; all ranks must do so together."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def each_gathered(model: nn.Module, modules: Mapping[str, _Module]) -> Iterator[tuple[str, _Module]]:
    """Yields modules by name while their weights are complete; units are gathered one at a time.

    Collective: all ranks must exhaust it.

    Args:
        model: The model; sharded or not.
        modules: Modules inside it.
    """
    pending = dict(modules)
    # Inner units first: a unit that contains others gathers only its other parameters.
    for unit in reversed([part for part in model.modules() if isinstance(part, FSDPModule)]):
        inside = set(unit.modules())
        found = [name for name, module in pending.items() if module in inside]
        if found:
            with gathered(unit):
                yield from ((name, pending.pop(name)) for name in found)
    yield from pending.items()


@contextmanager
def all_gathered(model: nn.Module) -> Iterator[None]:
    """Gathers all units of a model while the block runs, so that its forward passes are not collective."""
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(gathered(module))
        yield


def complete_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter under each of its names, complete and in the dtype of the computation.

    Sharded units are gathered one at a time, and freed when the next one is needed: copy what must stay. Collective:
    all ranks must exhaust it.

    Args:
        model: The model; sharded or not.
    """
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    tied, found = {name: group for group in names.values() for name in group}, set[str]()
    for path, module in each_gathered(model, dict(model.named_modules(remove_duplicate=False))):
        for key, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if key in found:
                continue  # under this name it may lie outside of the unit that gathers it
            found.update(tied[key])
            yield from ((name, parameter.detach()) for name in tied[key])


def trained_parameters(model: nn.Module, *, keep: bool = True, also: Collection[int] = ()) -> dict[str, Tensor]:
    """Returns every trained parameter under each of its names, complete and in the dtype of the computation.

    Collective. The model itself is never assembled.

    Args:
        model: The model; sharded or not.
        keep: Whether this rank needs the values; the result is empty otherwise.
        also: Identifiers of further parameters.
    """
    trained = {
        name: isinstance(parameter, DTensor)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or id(parameter) in also
    }
    found: dict[str, Tensor] = {}
    for name, value in complete_parameters(model):
        if keep and name in trained:
            found[name] = value.cpu().clone() if trained[name] else value
    return found
