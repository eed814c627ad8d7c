"""Shards a module over the ranks of a run with PyTorch's FSDP2: the one mechanism for ZeRO 1, 2, 3 and HSDP.

A unit is what is gathered at once: a decoder layer, or outside of the layers a module with parameters of its own
(the embedding, the last norm, the output head). Every unit has hooks that gather its weights before its forward and
before its backward pass, and free them afterwards. What is read without a call of its module is gathered for the step.

Parameters that are not sharded (the frozen base of ZeRO 1 and 2; a few that FSDP cannot cast together with their unit)
are on every rank, and :func:`ingle.parallel.sum_gradients` adds their gradients at the end of a step.

Source: Zhao et al. 2023, "PyTorch FSDP" (arXiv 2304.11277); Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ingle.kernels.allocator import keep_freed_memory
from ingle.parallel.mesh import Mesh, pick_device
from ingle.parallel.shards import is_sharded, local
from ingle.planning import Strategy

#: Freed blocks up to this size stay in a process that shards weights on a CPU; gathered layers are larger.
_KEPT_BYTES = 4 << 20

_Result = TypeVar("_Result")
_Module = TypeVar("_Module", bound=nn.Module)


def shards(mesh: Mesh, strategy: Strategy) -> bool:
    """Returns whether :func:`wrap` shards anything: one rank shares only with host memory."""
    return strategy.shards_optimizer and (mesh.world_size > 1 or strategy.offload)


def wrap(
    module: nn.Module,
    layers: Sequence[nn.Module],
    mesh: Mesh,
    strategy: Strategy,
    *,
    dtype: torch.dtype,
    head: nn.Module | None = None,
    whole: Collection[nn.Module] = (),
    read: Collection[nn.Module] = (),
) -> None:
    """Shards the parameters of a module in place, before its weights are read.

    A parameter that is trained in ``dtype`` is replaced by its float32 master, which is cast when it is gathered.
    Afterwards sharded parameters are DTensors, also inside the optimizer; while a unit computes, its modules have
    ordinary tensors.

    Args:
        module: Everything that a step computes; on the meta device.
        layers: The decoder layers inside it.
        mesh: The ranks.
        strategy: What they share. ``none`` and ``ddp`` change nothing.
        dtype: The dtype of the computation.
        head: The output layer, whose weights are read without a call of the modules around it.
        whole: Modules that are one unit each, because ranks may call what is inside them different numbers of times.
        read: Modules outside of the layers whose weights are read without calling them.
    """
    if not shards(mesh, strategy):
        return
    if strategy.shards_base and mesh.device.type == "cpu":
        keep_freed_memory(_KEPT_BYTES)
    device_mesh = _device_mesh(mesh, strategy)
    # FSDP would offload the optimizer with the base. What an adapter trains is small, and stays on every device.
    base_only = strategy.offload and not all(parameter.requires_grad for parameter in module.parameters())
    places = _places(module)
    for unit in _find_units(module, layers, head, whole, read):
        own = {parameter for part in unit for parameter in part.parameters()}
        _shard(unit, own, device_mesh, strategy, dtype, base_only=base_only)
        _tie_again(places)
    inside = {part for layer in (*layers, *whole) for part in layer.modules()}
    in_step = {parameter for part in read if part not in inside for parameter in part.parameters()}
    _shard([module], in_step, device_mesh, strategy, dtype, base_only=base_only)
    _tie_again(places)
    if not isinstance(module, FSDPModule):
        fully_shard(module, mesh=device_mesh, ignored_params=set(module.parameters()))
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # the loss is divided by the count of the whole step
            part.set_force_sum_reduction_for_comms(True)
            if hasattr(part, "set_reduce_scatter_unused_params"):  # since torch 2.13
                # An expert may have tokens, and so a gradient, on some ranks only: all of them must take part.
                part.set_reduce_scatter_unused_params(True)


def require_sharded_base(model: nn.Module, num_shards: int) -> None:
    """Makes sure that this rank has its share of every frozen weight and no more.

    Args:
        model: Sharded, with its weights loaded.
        num_shards: Ranks that share one copy.

    Raises:
        AssertionError: It has more: FSDP or the loading of weights does not do what was planned.
    """
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dim():
            share = -(-len(parameter) // num_shards) * (parameter.numel() // len(parameter)) * parameter.itemsize
            resident = local(parameter).untyped_storage().nbytes()
            assert resident <= share, f"{path} has {resident:,} bytes on this rank, and its share is {share:,}"


def compute_device(parameter: Tensor) -> torch.device:
    """Returns the device on which a parameter is used: its own, unless it is offloaded."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == parameter.device.type:
        return parameter.device
    return pick_device()


def skip_in_backward(module: nn.Module) -> None:
    """Leaves out gathering a frozen unit before its backward pass, which does not read its weights."""
    if isinstance(module, FSDPModule) and not any(parameter.requires_grad for parameter in module.parameters()):
        module.set_unshard_in_backward(False)


def reset_after_error(module: nn.Module) -> None:
    """Makes a sharded module usable after an error inside a step; discards the gradients of the step."""
    if isinstance(module, FSDPModule) and hasattr(module, "reset_iter_state"):  # since torch 2.13
        module.reset_iter_state()


def _device_mesh(mesh: Mesh, strategy: Strategy) -> DeviceMesh:
    kind, size = mesh.device.type, strategy.shard_size
    if not dist.is_initialized():  # one rank that offloads
        backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    # Groups that torch makes for a mesh would not have the time limit of the run.
    if size == mesh.world_size:
        world = dist.group.WORLD
        assert world is not None
        return DeviceMesh.from_group(world, kind, mesh_dim_names=("shard",))
    ranks = torch.arange(mesh.world_size).view(-1, size)
    groups = [
        dist.new_subgroups_by_enumeration(each.tolist(), timeout=mesh.timeout)[0]
        for each in (ranks.t().contiguous(), ranks)
    ]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _find_units(
    module: nn.Module,
    layers: Sequence[nn.Module],
    head: nn.Module | None,
    whole: Collection[nn.Module],
    read: Collection[nn.Module],
) -> list[list[nn.Module]]:
    """Returns the units, inner ones first; modules that share a parameter are one unit."""
    inner = set(layers)
    around_head = {
        part for part in module.modules() if part is not head and any(child is head for child in part.modules())
    }
    alone: dict[nn.Module, set[nn.Parameter]] = {}

    def visit(part: nn.Module) -> None:
        if part in read:
            return
        own = set(part.parameters(recurse=False))
        is_one = bool(own) or part in whole
        is_whole = is_one and part not in around_head and not any(child in inner for child in part.modules())
        if part in inner or is_whole:
            alone.setdefault(part, set(part.parameters()))
            return
        for child in part.children():
            visit(child)
            own -= set(child.parameters())  # such as BERT's bias, which its output layer has as well
        if own:
            alone.setdefault(part, own)

    visit(module)
    units: list[list[nn.Module]] = []
    for part, parameters in alone.items():
        shared = [unit for unit in units if any(not parameters.isdisjoint(alone[member]) for member in unit)]
        if shared and part not in inner and not any(member in inner for member in shared[0]):
            shared[0].append(part)
        else:
            units.append([part])
    return [unit for unit in units if any(True for part in unit for _ in part.parameters())]


_Places = dict[nn.Parameter, list[tuple[nn.Module, str]]]


def _places(module: nn.Module) -> _Places:
    """Returns the modules and keys of every parameter that several modules have."""
    places: _Places = {}
    for part in module.modules():
        for key, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((part, key))
    return {parameter: owners for parameter, owners in places.items() if len(owners) > 1}


def _tie_again(places: _Places) -> None:
    """Ties what was tied before the sharding, which replaces parameters inside their own unit only."""
    for parameter, owners in places.items():
        for sharded in (part._parameters[key] for part, key in owners if part._parameters[key] is not parameter):
            for part, key in owners:
                part._parameters[key] = sharded
            break


def _shard(
    unit: list[nn.Module],
    own: Collection[nn.Parameter],
    device_mesh: DeviceMesh,
    strategy: Strategy,
    dtype: torch.dtype,
    *,
    base_only: bool,
) -> None:
    """Shards the given parameters of one unit.

    FSDP casts all of them to one dtype, so the smaller part of mixed ones is left out.
    """
    parameters = {p for p in own if not is_sharded(p) and p.dim()}  # FSDP cannot shard scalars
    others = {p for part in unit for p in part.parameters()} - parameters
    trained = {p for p in parameters if p.requires_grad}
    exact = {p for p in parameters if p.dtype == torch.float32}
    cast = trained - exact
    keeps_frozen = exact <= trained  # nothing frozen would have to be left out
    gathered_in = dtype if cast and keeps_frozen and _size(cast) >= _size(trained & exact) else None
    ignored = set() if strategy.shards_base else parameters - trained
    if base_only:
        ignored |= trained
    elif gathered_in is None:
        ignored |= cast
    else:
        ignored |= exact
        for parameter in cast:
            parameter.data = parameter.data.float()  # the master
    if ignored == parameters:
        return
    fully_shard(
        unit if len(unit) > 1 else unit[0],
        mesh=device_mesh,
        reshard_after_forward=strategy.shards_base,
        mp_policy=MixedPrecisionPolicy(None if base_only else gathered_in, torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=device_mesh.device_type == "cuda")
        if strategy.offload
        else OffloadPolicy(),
        ignored_params=ignored | others,
    )


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
