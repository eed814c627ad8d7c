"""What a model with an adapter computes: the adapted function, its base, or the function that training began with.

A module that an adapter changed is an :class:`Adapted`. Two kinds of copies let a model return to an earlier function
without a second model: of trained modules' weights before training (:data:`BEFORE`), and of everything trained at the
first step, where that is another function than the base (:data:`INITIAL`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ingle.errors import AdapterError
from ingle.parallel import is_sharded, local

#: Suffix of the buffers that keep the weights of trained modules from before training; they are never saved.
BEFORE = "_before_training"
#: Suffix of the buffers that keep what is trained as it is at the first step; they are in checkpoints, not in results.
INITIAL = "_at_first_step"
#: Attribute of a module whose parameters have the values of these buffers now.
_HOLDS = "_holds_values"


class Adapted(nn.Module):
    """A layer that an adapter changed: its original is ``base``, and the adapter's tensors are its other parameters.

    Attributes:
        base: The original layer; None for a module that an adapter added.
        is_on: Whether the change is applied.
        role: The other function whose change is applied; None for the adapter's own.
        starts_at_base: Whether the layer computed what its base computes when training began.
    """

    #: Buffers that follow from the parameters, and are kept with them.
    derived: tuple[str, ...] = ("norm",)
    base: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True
        self.role: str | None = None
        self.starts_at_base = True

    @property
    def is_initial(self) -> bool:
        """Whether the layer has its copies of the first step in place of what is trained now."""
        return getattr(self, _HOLDS, None) == INITIAL

    def has_role(self, name: str) -> bool:
        """Returns whether the layer has tensors of another function."""
        return False

    @property
    def unmerged(self) -> str | None:
        """Why the adapter cannot be merged into the weights of the base; None if it can."""
        return "it changes more than weights"

    @property
    def obstacle(self) -> str | None:
        """Why the layer cannot be part of a fused one; None if it can."""
        return "its adapters are not low-rank"

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that belong to the adapter and not to the base."""
        of_base = set() if self.base is None else {id(parameter) for parameter in self.base.parameters()}
        yield from (parameter for parameter in self.parameters() if id(parameter) not in of_base)


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """Returns every module that the adapter changed by its path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def own_parameters(model: nn.Module) -> set[int]:
    """Returns the identifiers of all parameters that are part of the adapter and not of the base."""
    return {id(p) for module in adapted_modules(model).values() for p in module.own_parameters()}


def has_initial(model: nn.Module) -> bool:
    """Returns whether ``use(model, "initial")`` is possible: the model begins at its base, or a copy was kept."""
    adapted = adapted_modules(model).values()
    if not adapted and not any(copied(module, BEFORE) or copied(module, INITIAL) for module in model.modules()):
        return not any(parameter.requires_grad for parameter in model.parameters())
    return all(
        module.starts_at_base
        or any(copied(part, INITIAL) for part in module.modules())
        or not any(parameter.requires_grad for parameter in module.own_parameters())
        for module in adapted
    )


@contextmanager
def use(model: nn.Module, state: str) -> Iterator[None]:
    """Makes a model compute another function while the block runs, also inside another such block.

    Enter it outside of forward passes. Backward passes may follow outside, also of layers that are recomputed, unless
    the model computes with copies of trained modules. Sharded models may be used inside, all ranks together.

    Args:
        model: A model; without an adapter it computes the same in every state.
        state: ``on``: what is trained. ``off``: the base, with the weights that trained modules had before training.
            ``initial``: what the model computed before the first step. Another name: the function of
            :func:`ingle.adapters.add_role`, which shares trained modules, such as a head, with ``on``.

    Raises:
        AdapterError: There is no such function; or the initial function is wanted, but it is not the base and nothing
            was kept of it, or all weights are trained.
    """
    adapted = adapted_modules(model).values()
    role = None if state in ("on", "off", "initial") else state
    if role is not None and not any(module.has_role(role) for module in adapted):
        raise AdapterError(f"This adapter has no role {role!r}.", where="adapter", fix="add_role before it is used")
    if state == "initial" and not has_initial(model):
        raise AdapterError(
            "The function that training began with was not kept.",
            where="adapter",
            why="the adapter does not begin at its base, and only objectives with a reference keep a copy of it"
            if adapted
            else "all weights are trained, so it is gone after the first step",
            fix="begin with a new adapter, without adapter.path" if adapted else "--adapter.kind=lora",
        )
    held = [module for module in model.modules() if copied(module, BEFORE) or copied(module, INITIAL)]
    before = [(module, module.is_on, module.role) for module in adapted]
    holding = [(module, getattr(module, _HOLDS, None)) for module in held]
    try:
        for module in held:
            first = INITIAL if state == "initial" and copied(module, INITIAL) else BEFORE
            _hold(module, None if state == "on" or role is not None else first)
        for module in adapted:
            module.role = role
            module.is_on = state == "on" or (state == "initial" and not module.starts_at_base)
            module.is_on |= role is not None and module.has_role(role)
        yield
    finally:
        for module, kept in holding:
            _hold(module, kept)
        _set_states(before)


def as_now(module: nn.Module) -> AbstractContextManager[None]:
    """Returns a context in which a module computes the function that is in use now.

    Backward repeats a recomputed layer after the block of :func:`use` in which its forward pass ran.
    """
    return _in_states([(each, each.is_on, each.role) for each in module.modules() if isinstance(each, Adapted)])


@contextmanager
def _in_states(states: Sequence[tuple[Adapted, bool, str | None]]) -> Iterator[None]:
    before = [(module, module.is_on, module.role) for module, _, _ in states]
    _set_states(states)
    try:
        yield
    finally:
        _set_states(before)


def _set_states(states: Sequence[tuple[Adapted, bool, str | None]]) -> None:
    for module, is_on, role in states:
        module.is_on, module.role = is_on, role


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Makes a model compute the same as its base while the block runs; see :func:`use`."""
    return use(model, "off")


def keep_initial(model: nn.Module) -> None:
    """Keeps a copy of everything that is trained, for ``use(model, "initial")`` of a model that begins elsewhere."""
    kept: set[int] = set()
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and id(parameter) not in kept:
                kept.add(id(parameter))
                module.register_buffer(key + INITIAL, parameter.detach().clone(), persistent=False)
        for key in module.derived if isinstance(module, Adapted) else ():
            if key in module._buffers:
                module.register_buffer(key + INITIAL, module.get_buffer(key).clone(), persistent=False)


class AdapterState:
    """What checkpoints keep of an adapter besides its trained weights: frozen tensors, and copies of the first step.

    Args:
        model: A model with its adapter initialized, in the state ``on``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {
            f"{path}.{key}": module.get_buffer(key + INITIAL)
            for path, module in model.named_modules()
            for key in copied(module, INITIAL)
        }
        own = own_parameters(model)
        frozen = {name: p for name, p in model.named_parameters() if id(p) in own and not p.requires_grad}
        self._tensors |= {name: parameter.detach() for name, parameter in frozen.items()}

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def like(self, name: str) -> Tensor | None:
        """Returns the tensor that is sharded like the one of this name."""
        return self._tensors.get(name)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the tensors by the paths of what they are, or are copies of."""
        return dict(self._tensors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned, bit for bit."""
        for name, tensor in self._tensors.items():
            local(tensor).copy_(local(state[name]))


def copied(module: nn.Module, suffix: str) -> list[str]:
    """Returns the tensors of a module that have a copy with this suffix."""
    return [key.removesuffix(suffix) for key in module._buffers if key.endswith(suffix)]


def _hold(module: nn.Module, suffix: str | None) -> None:
    """Gives the parameters of a module the values of the buffers with a suffix; None for what is trained."""
    held = getattr(module, _HOLDS, None)
    if held == suffix:
        return
    for each in (held, suffix):  # what is trained returns first
        if each is not None:
            for key in copied(module, each):
                _swap(getattr(module, key), module.get_buffer(key + each))
    setattr(module, _HOLDS, suffix)


def _swap(parameter: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        if is_sharded(parameter):  # FSDP gathers from the memory of the parameter
            values = local(parameter).clone()
            local(parameter).copy_(local(before))
            local(before).copy_(values)
        else:
            parameter.data, before.data = before.data, parameter.data
