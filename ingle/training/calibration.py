"""Reads training data before the first step, for initial values of adapters that follow from it.

The adapters themselves measure: with A = X and B = 0 the model computes its base, and the gradient of B is the gradient
of the base's weight times X^T. So a few backward passes find its principal directions, over bases of any format,
without a gradient of the size of the weight. Inputs are observed as for importance matrices.

The data are those that training begins with, and are not used up. What is found is part of the adapter: a run that
resumes reads no data for it.

Legend: O out_features, I in_features, R rank, K directions, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ingle import adapters
from ingle.adapters.data_starts import Directions, require_directions, start_from_gradients, start_from_inputs
from ingle.adapters.lora import LoraLinear, generator_of
from ingle.config.adapter import READS_DATA, AdapterConfig, DoraAdapter, InitOptions, LoraAdapter
from ingle.data.batch import Batch
from ingle.kernels.layers.importance import Gate, SquaredInputs, observe
from ingle.models import Model
from ingle.objectives import Objective
from ingle.parallel import Mesh, add_over_ranks, call_outside_step, copy_rows, full, is_sharded, local, sum_gradients
from ingle.training.steps import compute_gradients, prepare

#: Directions that are followed for each one that is wanted, so that the wanted ones are found well.
_OVERSAMPLING = 2
_Value = TypeVar("_Value")


def calibrate(model: Model, adapter: AdapterConfig, objective: Objective, mesh: Mesh, *, seed: int) -> AdapterConfig:
    """Gives a new adapter the initial values that follow from training data; all ranks call it together.

    Args:
        model: The model with its adapter, before it has an optimizer.
        adapter: The section that was inserted.
        objective: Supplies the data and the loss.
        mesh: The ranks.
        seed: The seed of the run.

    Returns:
        The section; EVA changes its ranks.

    Raises:
        AdapterError: A rank is too large, or ranks would change in a sharded model.
        NonFiniteError: A loss is NaN or infinite.
    """
    if not isinstance(adapter, LoraAdapter | DoraAdapter) or adapter.init not in READS_DATA or adapter.path is not None:
        return adapter
    layers, options = adapters.lora_modules(model), adapter.init_options
    with _undisturbed(objective, list(layers.values())):
        steps = [objective.next_batches() for _ in range(options.num_steps)]
        if adapter.init == "lora_ga":
            require_directions(layers)
            probe = _Gradients(layers, objective, steps, mesh, seed)
            start_from_gradients(layers, probe.directions(options), options)
            return adapter
        return _start_from_inputs(model, adapter, layers, objective, steps, mesh, seed)


@contextmanager
def _undisturbed(objective: Objective, layers: Sequence[LoraLinear]) -> Iterator[None]:
    """Trains both factors without dropout inside the block, and puts back everything but their values after it."""
    state, was_training = dict(objective.state_dict()), objective.module.training
    before = [(layer.dropout, layer.lora_a.requires_grad) for layer in layers]
    for layer in layers:
        layer.dropout = 0.0
        layer.lora_a.requires_grad_(True)
    try:
        yield
    finally:
        objective.load_state_dict(state)
        objective.module.train(was_training)
        for layer, (dropout, trains_a) in zip(layers, before, strict=True):
            layer.dropout = dropout
            layer.lora_a.requires_grad_(trains_a)
        for parameter in objective.module.parameters():
            parameter.grad = None


class _Gradients:
    """Products of the gradients of the base's weights with matrices, by backward passes through the adapters."""

    def __init__(
        self,
        layers: Mapping[str, LoraLinear],
        objective: Objective,
        steps: Sequence[Sequence[Batch]],
        mesh: Mesh,
        seed: int,
    ) -> None:
        self._layers, self._objective, self._steps = layers, objective, steps
        self._mesh, self._seed = mesh, seed

    def directions(self, options: InitOptions) -> dict[str, Directions]:
        """Returns the principal directions of the mean gradient of each layer.

        Source: Halko et al. 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
        """
        rows: dict[str, Tensor] = {}
        for path, layer in self._layers.items():
            width = min(2 * _OVERSAMPLING * layer.rank, layer.out_features, layer.in_features)
            drawn = torch.randn(width, layer.in_features, generator=generator_of(self._seed, path))
            rows[path] = drawn
        for _ in range(1 + options.iterations):
            right = _orthonormal({path: value.t() for path, value in rows.items()}, self._mesh)
            seen = self._products({path: value.t() for path, value in right.items()}, of_inputs=True)
            left = _orthonormal(seen, self._mesh)
            rows = self._products({path: value.t() for path, value in left.items()}, of_inputs=False)

        def decompose() -> dict[str, Directions]:
            parts = {path: torch.linalg.svd(value, full_matrices=False) for path, value in rows.items()}
            return {path: Directions(left[path] @ u_KK, s_K, v_KI) for path, (u_KK, s_K, v_KI) in parts.items()}

        return _agreed(self._mesh, decompose)

    def _products(self, rows: Mapping[str, Tensor], *, of_inputs: bool) -> dict[str, Tensor]:
        """Returns ``G rows^T`` ``[O, K]`` for rows ``[K, I]``; for rows ``[K, O]`` ``rows G`` ``[K, I]``.

        A sharded adapter measures as many rows at once as it has; any other is widened for that.
        """
        with _widened(self._layers, {path: len(value) for path, value in rows.items()}):
            turns = max(-(-len(value) // self._layers[path].rank) for path, value in rows.items())
            found: dict[str, list[Tensor]] = {path: [] for path in rows}
            for turn in range(turns):
                for path, value in rows.items():
                    self._set(path, value, turn, of_inputs=of_inputs)
                self._backward()
                for path, layer in self._layers.items():
                    measured = layer.lora_b if of_inputs else layer.lora_a
                    assert measured.grad is not None, f"no gradient reaches {path}"
                    found[path].append(full(measured.grad).cpu() / (layer.scale * len(self._steps)))
        axis = 1 if of_inputs else 0
        return {path: torch.cat(parts, axis).narrow(axis, 0, len(rows[path])) for path, parts in found.items()}

    def _set(self, path: str, rows: Tensor, turn: int, *, of_inputs: bool) -> None:
        layer = self._layers[path]
        part = rows[turn * layer.rank : (turn + 1) * layer.rank]
        part = nn.functional.pad(part, (0, 0, 0, layer.rank - len(part)))
        measuring, measured = (layer.lora_a, layer.lora_b) if of_inputs else (layer.lora_b, layer.lora_a)
        with torch.no_grad():
            copy_rows(measuring, part if of_inputs else part.t())
            local(measured).zero_()
        measuring.grad = measured.grad = None

    def _backward(self) -> None:
        module = self._objective.module
        module.train()
        with torch.enable_grad():
            for number, batches in enumerate(self._steps):
                parts = prepare(self._objective, batches)
                compute_gradients(self._objective, parts, self._mesh, seed=self._seed, step=-1 - number)
        factors = [factor for layer in self._layers.values() for factor in (layer.lora_a, layer.lora_b)]
        sum_gradients(factors, self._mesh)


@contextmanager
def _widened(layers: Mapping[str, LoraLinear], widths: Mapping[str, int]) -> Iterator[None]:
    """Gives adapters that are not sharded other ranks inside the block, and their own tensors after it."""
    if any(is_sharded(factor) for layer in layers.values() for factor in (layer.lora_a, layer.lora_b)):
        yield
        return
    before = {path: (layer.lora_a, layer.lora_b) for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            a, b = before[path]
            layer.lora_a = nn.Parameter(a.new_zeros(widths[path], a.shape[1]))
            layer.lora_b = nn.Parameter(b.new_zeros(len(b), widths[path]))
        yield
    finally:
        for path, layer in layers.items():
            layer.lora_a, layer.lora_b = before[path]


def _start_from_inputs(
    model: Model,
    adapter: LoraAdapter | DoraAdapter,
    layers: Mapping[str, LoraLinear],
    objective: Objective,
    steps: Sequence[Sequence[Batch]],
    mesh: Mesh,
    seed: int,
) -> LoraAdapter | DoraAdapter:
    """Begins adapters with the principal directions of their inputs, found by subspace iteration."""
    width = round(_OVERSAMPLING * adapter.init_options.rho * max(layer.rank for layer in layers.values()))
    # Layers with one input have one basis, so that fused layers may observe it once for all of them.
    bases = {
        size: torch.linalg.qr(torch.randn(size, min(width, size), generator=generator_of(seed, f"inputs of {size}")))[0]
        for size in sorted({layer.in_features for layer in layers.values()})
    }
    found = {path: bases[layer.in_features].double() for path, layer in layers.items()}
    for _ in range(1 + adapter.init_options.iterations):
        seen = _observe(layers, found, objective, steps, mesh)
        found = _orthonormal({path: value[:, :-1] for path, value in seen.items()}, mesh)
    seen = _observe(layers, found, objective, steps, mesh)
    parts = _agreed(mesh, lambda: {path: _decompose(found[path], value) for path, value in seen.items()})
    right, shares = ({path: part[place] for path, part in parts.items()} for place in (0, 1))
    return start_from_inputs(model, adapter, layers, right, shares)


def _decompose(basis_IK: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the principal directions ``[K, I]`` within a basis, and the share of all squares along each ``[K]``."""
    squares_KK = basis_IK.t() @ seen[:, :-1]
    sizes_K, turn_KK = torch.linalg.eigh((squares_KK + squares_KK.t()) / 2)
    total = seen[:, -1].sum().clamp_min(torch.finfo(torch.float64).tiny)
    return (basis_IK @ turn_KK.flip(1)).t().float(), (sizes_K.flip(0) / total).float()


class _SketchGate(Gate):
    """Measures the products of the second moment of an input with a basis, and its diagonal.

    Args:
        basis: ``[I, K]``.
    """

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self._basis = basis

    def measure(self, x: Tensor) -> tuple[Tensor, int] | None:
        """Returns ``[I, K + 1]`` for ``[..., I]``: ``X^T X basis``, and the sums of squares; None when closed."""
        if self._num_rows is None:
            return None
        x_NI = x.detach().reshape(-1, x.shape[-1])[: self._num_rows].double()
        seen_NK = x_NI @ self._basis.to(x_NI.device)
        return torch.cat((x_NI.t() @ seen_NK, x_NI.square().sum(0)[:, None]), 1).cpu(), len(x_NI)


@torch.no_grad()
def _observe(
    layers: Mapping[str, LoraLinear],
    bases: Mapping[str, Tensor],
    objective: Objective,
    steps: Sequence[Sequence[Batch]],
    mesh: Mesh,
) -> dict[str, Tensor]:
    """Returns what the inputs of each layer are along its basis, float64 ``[I, K + 1]``; see :class:`_SketchGate`."""
    sketches: dict[str, SquaredInputs] = {}
    module = objective.module
    module.eval()
    with ExitStack() as stack:
        for path, layer in layers.items():
            sketch = SquaredInputs(layer.in_features, _SketchGate(bases[path]))
            sketch.sums = torch.zeros(layer.in_features, bases[path].shape[1] + 1, dtype=torch.float64)
            sketches[path] = sketch
            layer.squared_inputs = sketch  # type: ignore[assignment]  # read by fused layers, which call no hooks
            stack.callback(delattr, layer, "squared_inputs")
            stack.callback(layer.register_forward_pre_hook(_hook(sketch)).remove)
        for batches in steps:
            for batch in prepare(objective, batches):
                with ExitStack() as gates:
                    for sketch in sketches.values():
                        gates.enter_context(sketch.gate.opened(batch.num_tokens))
                    call_outside_step(module, module.compute, batch)
    return {path: add_over_ranks(sketch.sums, mesh) for path, sketch in sketches.items()}


def _hook(sketch: SquaredInputs) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        observe(arguments[0], [sketch])

    return hook


def _orthonormal(matrices: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Returns an orthonormal basis of the columns of each matrix."""
    return _agreed(mesh, lambda: {path: torch.linalg.qr(value)[0] for path, value in matrices.items()})


def _agreed(mesh: Mesh, compute: Callable[[], _Value]) -> _Value:
    """Returns the value of rank 0, whose rounding is not that of other machines."""
    value: _Value = mesh.broadcast(compute() if mesh.is_main else None)
    return value
