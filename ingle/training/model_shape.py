"""Counts the shapes of a model for the planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

from torch import Tensor

from ingle.adapters import Selection
from ingle.models import Model, decoder_layers
from ingle.planning import LinearShape, ModelShape
from ingle.quant import Formats


def model_shape(model: Model, trained: Selection, formats: Formats | None = None) -> ModelShape:
    """Counts the shapes of a model before its linear layers are replaced.

    A fused expert parameter ``[experts, out, in]`` counts as ``experts`` linear layers, of which each token uses
    ``num_experts_per_tok``.

    Args:
        model: The model; it may be on the meta device.
        trained: Which of its modules get an adapter, and which are trained in full.
        formats: Chooses the format of each linear layer, if they may differ.
    """
    config = model.config.get_text_config()
    counts: Counter[tuple[int, int]] = Counter()
    active: Counter[tuple[int, int]] = Counter()
    targets: Counter[tuple[int, int]] = Counter()
    bits: Counter[tuple[int, int]] = Counter()
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3:
                    shape = (weight.shape[2], weight.shape[1])
                    counts[shape] += weight.shape[0]
                    active[shape] += getattr(config, "num_experts_per_tok", 1) or 1
                elif weight.dim() == 2 and name == "weight":
                    shape = (weight.shape[1], weight.shape[0])
                    counts[shape] += 1
                    active[shape] += 1
                    bits[shape] += 0 if formats is None else _bits(formats, names[id(module)], weight)
    for path in trained.adapted:
        matrix = model.get_submodule(path).weight
        assert isinstance(matrix, Tensor)
        targets[(matrix.shape[1], matrix.shape[0])] += 1
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    linears = tuple(
        LinearShape(
            *shape, count, active[shape], targets[shape], bits[shape] / count / prod(shape) if bits[shape] else None
        )
        for shape, count in sorted(counts.items())
    )
    return ModelShape(
        num_parameters=num_parameters,
        linears=linears,
        other_parameters=num_parameters - sum(lin.num_weights * lin.count for lin in linears),
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        saved_parameters=_count_parameters(model, trained.modules_to_save),
    )


def _bits(formats: Formats, name: str, weight: Tensor) -> int:
    """Counts the bits of a module's weight in its format."""
    out_features, in_features = weight.shape
    format = formats(name, out_features, in_features)
    if format is None:
        return 8 * weight.numel() * weight.element_size()
    return 8 * sum(spec.num_bytes for spec in format.plane_specs(out_features, in_features).values())


def _count_parameters(model: Model, paths: Iterable[str]) -> int:
    """Counts the parameters of modules; shared ones once."""
    parameters = {id(p): p.numel() for path in paths for p in model.get_submodule(path).parameters()}
    return sum(parameters.values())
