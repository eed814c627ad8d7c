"""What adapters add to the memory of a run: their parameters, and what their layers keep for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ingle.config.adapter import DoraAdapter, LowRankAdapter, QaLoraAdapter
from ingle.config.adapter_kinds import BottleneckAdapter, Ia3Adapter, PromptAdapter
from ingle.config.base import HqqBase
from ingle.config.run import Run
from ingle.planning.companions import value_head_parameters, value_rank
from ingle.planning.shape import LayerShape, LinearShape, ModelShape


def parameters_of(run: Run, model: ModelShape) -> int:
    """Counts the trained parameters of an adapter and of a value function, without modules trained in full."""
    values = role_parameters(model.linears, value_rank(run)) + value_head_parameters(run, model)
    return own_parameters(run, model) + values


def own_parameters(run: Run, model: ModelShape) -> int:
    """Counts those of the adapter alone."""
    if model.adapter_parameters is not None:
        return model.adapter_parameters
    return _low_rank(run, model.linears)


def parameters_in_layer(run: Run, model: ModelShape, layer: LayerShape) -> float:
    """Counts what :func:`parameters_of` counts in one layer."""
    values = role_parameters(layer.linears, value_rank(run))
    if model.adapter_parameters is not None:
        return model.adapter_parameters / max(1, model.num_layers) + values
    return _low_rank(run, layer.linears) + values


def role_parameters(linears: Iterable[LinearShape], rank: int) -> int:
    """Counts A and B of a role with this rank, in every adapted layer."""
    return rank * sum((lin.in_features + lin.out_features) * lin.adapted for lin in linears)


def group_size(run: Run) -> int:
    """Returns how many inputs share a column of A."""
    if not isinstance(run.adapter, QaLoraAdapter):
        return 1
    base = run.base
    return base.group_size if isinstance(base, HqqBase) else 32  # GGUF formats with an offset


def allows_fused(run: Run) -> bool:
    """Returns whether layers with this adapter can be fused."""
    return isinstance(run.adapter, LowRankAdapter | PromptAdapter)


def kept_features(run: Run, lin: LinearShape) -> float:
    """Returns the features per token that the adapter of a linear layer keeps besides the layer's input."""
    adapter = run.adapter
    if isinstance(adapter, DoraAdapter):
        return 2 * adapter.largest_rank + lin.out_features  # the outputs, for the gradient of the magnitudes
    if isinstance(adapter, LowRankAdapter):
        return adapter.largest_rank * (1 + adapter.subtracts)
    if isinstance(adapter, Ia3Adapter):
        return lin.out_features
    if isinstance(adapter, BottleneckAdapter):  # the outputs of the sublayer, and those around the activation
        return lin.out_features + 2 * adapter.width(lin.out_features)
    return 0


def _low_rank(run: Run, linears: Iterable[LinearShape]) -> int:
    assert isinstance(run.adapter, LowRankAdapter)
    size = group_size(run)
    rank, magnitudes = run.adapter.largest_rank, int(isinstance(run.adapter, DoraAdapter))
    return sum(
        (rank * (math.ceil(lin.in_features / size) + lin.out_features) + magnitudes * lin.out_features) * lin.adapted
        for lin in linears
    )
