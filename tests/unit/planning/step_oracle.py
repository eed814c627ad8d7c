"""Measures the memory of Ingle's own training step by PyTorch's memory tracker, at any size and without a GPU.

Modules, loss, optimizer and wrapping are those of a run. Tensors are PyTorch's fake ones, which have a size and no
memory, so a model of 70 billion parameters takes a second. Kernels that are not made of PyTorch operators are replaced
by functions that allocate the same results; a test compares both on real tensors.
"""

from __future__ import annotations

import gc
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from ingle import adapters, models, parallel
from ingle.adapters import fusion
from ingle.adapters.adapted import keep_initial_values
from ingle.config import Run
from ingle.data.batch import Batch
from ingle.kernels.attention import packed
from ingle.kernels.attention.spans import AttentionSpans
from ingle.kernels.layers import cross_entropy, decoder_layer
from ingle.objectives import NextTokenLoss
from ingle.parallel import local, wrapping
from ingle.planning import ModelShape, Strategy
from ingle.quant.format import Format
from ingle.training import steps
from ingle.training.groups import parameter_groups
from ingle.training.model_shape import model_shape
from ingle.training.optim import Optimizer

_ALONE = Strategy()


@dataclass(frozen=True)
class Measured:
    """What a step takes.

    Attributes:
        peak_bytes: Most bytes alive at once.
        resting_bytes: Bytes alive after the step: weights, adapters, optimizer states, buffers.
        shape: The model, as the planner sees it.
    """

    peak_bytes: int
    resting_bytes: int
    shape: ModelShape


class _Objective:
    """The parts of an objective that :func:`steps.compute_gradients` uses."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def measure(
    folder: Path,
    config: Mapping[str, Any],
    run: Run,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    strategy: Strategy = _ALONE,
    fused: bool = False,
    real: bool = False,
) -> Measured:
    """Runs two steps of full micro-batches on rank 0.

    Args:
        folder: An empty folder.
        config: The ``config.json`` of the model.
        run: Base and adapter.
        tokens: Tokens of a micro-batch; all but one have a label.
        dtype: Compute dtype.
        strategy: What the ranks share; other ranks exist in a fake process group only.
        fused: Whether layers are fused where they can be.
        real: Whether tensors have memory and kernels run; for small models.
    """
    (folder / "config.json").write_text(json.dumps(config))
    run = run.model_copy(update={"model": run.model.model_copy(update={"id": str(folder)})})
    models.meta_model(run.model, "cpu", dtype)  # its layout is chosen by computing, which needs real tensors
    with ExitStack() as stack:
        if not real:
            stack.enter_context(_fake_kernels())
            stack.enter_context(_answers(tokens - 1))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        mesh = stack.enter_context(_ranks(strategy.world_size))
        stack.enter_context(_hooks_on_frozen_weights())
        model = models.meta_model(run.model, "cpu", dtype)
        formats = models.choose_formats(model, run.model, run.base)
        shape = model_shape(model, adapters.select(model, run.adapter), formats)
        if not real and shape.layers[0].num_experts:
            stack.enter_context(_routing(shape.layers[0].num_experts))
        models.convert_base(model, run.model, run.base)
        selection = adapters.insert(model, run.adapter)
        if strategy.recompute:
            models.recompute_layers(model)
        if fused:
            assert not adapters.insert_fused(model, mesh.device).reasons, "this model has no fused layers"
        module = NextTokenLoss(model)
        module.reduces_once = strategy.kind == "zero1"
        parallel.wrap(module, models.repeated_layers(model), mesh, strategy, dtype=dtype)
        parallel.skip_in_backward(model.get_output_embeddings())
        _allocate(model)
        if run.adapter.kind != "none":
            keep_initial_values(model, selection.modules_to_save)
        for layer in model.modules():
            if isinstance(layer, fusion.FusedLayer):
                layer.enabled = True
        optimizer = Optimizer(parameter_groups(model, run.adapter, run.optim), run.optim, mesh)
        module.train()
        batches = [_batch(tokens) for _ in range(strategy.grad_accum_steps)]
        tracker = MemTracker()
        masters = [master for _, master in optimizer.named_masters()]
        tracker.track_external(module, optimizer._adamw, *masters, *(t for b in batches for t in b.columns.values()))
        objective: Any = _Objective(module)

        def begin(module: nn.Module, enabled: bool) -> None:
            gc.collect()  # the tracker's hooks keep recomputed tensors in reference cycles
            tracker.reset_mod_stats()
            parallel.reduce_in_backward(module, enabled)

        stack.enter_context(mock.patch.object(steps, "reduce_in_backward", begin))
        with tracker:
            for step in (1, 2):  # the first creates the states of the optimizer
                steps.compute_gradients(objective, batches, mesh, seed=0, step=step)
                optimizer.sum_gradients()
                optimizer.clip()
                optimizer.step(1e-4)
                optimizer.clear()
        peak, rest = (tracker.get_tracker_snapshot(kind)[torch.device("cpu")]["Total"] for kind in ("peak", "current"))
    return Measured(peak, rest, shape)


@contextmanager
def _ranks(world_size: int) -> Iterator[parallel.Mesh]:
    """Yields rank 0 of several; the others answer nothing."""
    device = torch.device("cpu")
    if world_size == 1:
        yield parallel.Mesh(device)
        return
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        make = wrapping._device_mesh

        def make_real(mesh: parallel.Mesh, strategy: Strategy) -> Any:
            with unset_fake_temporarily():  # it is made of the numbers of ranks
                return make(mesh, strategy)

        shapes = ShardingPropagator._propagate_tensor_meta_non_cached

        def without_tracking(*arguments: Any) -> Any:
            with _disable_current_modes():  # DTensor finds shapes by fake tensors of its own
                return shapes(*arguments)

        with (
            mock.patch.object(wrapping, "_device_mesh", make_real),
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", without_tracking),
        ):
            yield parallel.Mesh(device, 0, world_size, 0, world_size)
    finally:
        dist.destroy_process_group()


def _allocate(model: nn.Module) -> None:
    """Replaces parameters and buffers on the meta device by ones on the CPU; shared ones stay shared."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = parallel.allocated(parameter, torch.device("cpu"))
                module._parameters[name] = replaced[id(parameter)]
                with torch.no_grad():
                    local(module._parameters[name]).zero_()
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _batch(tokens: int) -> Batch:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    columns = {"input_ids": ids, "labels": torch.zeros_like(ids), "position_ids": torch.arange(tokens)[None]}
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    return Batch(columns | {"cu_seqlens": bounds}, tokens, 1, tokens - 1)


@contextmanager
def _answers(supervised: int) -> Iterator[None]:
    """Answers what fake tensors cannot: values."""
    answers: dict[str, Callable[..., Any]] = {
        "item": lambda tensor: 1.0,
        "__float__": lambda tensor: 1.0,
        "__bool__": lambda tensor: True,
        "tolist": lambda tensor: [1] * tensor.numel(),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, answer, create=True))
        stack.enter_context(mock.patch.object(torch, "nonzero", lambda mask: torch.arange(supervised)[:, None]))
        yield


@contextmanager
def _hooks_on_frozen_weights() -> Iterator[None]:
    """Lets the tracker register hooks on frozen weights, which it does and PyTorch refuses."""
    with ExitStack() as stack:
        for name in ("register_hook", "register_post_accumulate_grad_hook"):
            register = getattr(Tensor, name)

            def skip_frozen(tensor: Tensor, hook: Any, register: Any = register) -> Any:
                return register(tensor, hook) if tensor.requires_grad else RemovableHandle(OrderedDict())

            stack.enter_context(mock.patch.object(Tensor, name, skip_frozen))
        yield


@contextmanager
def _fake_kernels() -> Iterator[None]:
    """Replaces kernels in numba or Triton by functions that allocate the same results."""
    with ExitStack() as stack:
        for module, functions in _KERNELS.items():
            for function in functions:
                stack.enter_context(mock.patch.object(module, function.__name__, function))
        stack.enter_context(mock.patch.object(AttentionSpans, "of", staticmethod(_spans)))
        stack.enter_context(mock.patch.object(Format, "decode", _decode))
        yield


@contextmanager
def _routing(num_experts: int) -> Iterator[None]:
    """Routes equally many tokens to each expert."""

    def runs(experts: Tensor, return_counts: bool) -> tuple[Any, Any]:
        return np.arange(num_experts), np.full(num_experts, experts.numel() // num_experts)

    with mock.patch.object(Tensor, "unique_consecutive", runs):
        yield


def _spans(cu_seqlens: Tensor, heads: Any, **options: Any) -> Any:
    return AttentionSpans(heads, *(None,) * 2, (), *(None,) * 2)  # type: ignore[arg-type]


def _decode(format: Format, planes: Any, rows: int, columns: int, dtype: torch.dtype, out: Tensor | None = None) -> Any:
    return torch.empty(rows, columns, dtype=dtype) if out is None else out


def group_rows(source: Tensor, by: Any, heads: Any, rotary: Any = None) -> Tensor:
    return torch.empty(source.numel(), dtype=source.dtype)


def ungroup_rows(grouped: Tensor, out: Tensor, by: Any, heads: Any, rotary: Any = None) -> Tensor:
    return out


def group_gradient(grad: Tensor, out: Tensor, spans: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(grad.numel(), dtype=grad.dtype), torch.empty(grad.shape[0] * spans.heads.q)


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Any, scores: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty(q.numel() // spans.heads.size)


def attend_backward(
    grad: Tensor, delta: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty(k.shape), torch.empty(v.shape)


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h, memory_format=torch.contiguous_format), torch.empty(len(h))


def recompute_rms_norm(h: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def rms_norm_backward_(grad: Tensor, *_: Any) -> Tensor:
    return grad


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


def swiglu_backward_(*_: Tensor) -> None:
    return None


def score(logits: Tensor, targets: Tensor, transform: Any) -> Tensor:
    return torch.empty(len(targets))


def score_with_gradient_(logits: Tensor, targets: Tensor, transform: Any) -> Tensor:
    return torch.empty(len(targets))


_ATTENTION = (group_rows, ungroup_rows, group_gradient, attend, attend_backward)
_KERNELS: Mapping[Any, tuple[Any, ...]] = {
    packed: _ATTENTION,
    decoder_layer: (*_ATTENTION, rms_norm, recompute_rms_norm, rms_norm_backward_, swiglu, swiglu_backward_),
    cross_entropy: (score, score_with_gradient_),
}
