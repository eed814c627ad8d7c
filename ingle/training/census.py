"""Counts a model's shapes for the planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from ingle.adapters import Selection
from ingle.models import Model, decoder_layers
from ingle.planning import LinearShape, ModelShape


def model_shape(model: Model, trained: Selection) -> ModelShape:
    """Shapes of a model as it comes from the skeleton, before its linear maps are replaced.

    A fused expert parameter ``[experts, out, in]`` counts as that many linear maps, of which
    ``num_experts_per_tok`` lie on the path of a token.

    Args:
        model: The model; the meta device will do.
        trained: Which of its modules get an adapter, and which are trained whole.
    """
    config = model.config.get_text_config()
    counts: Counter[tuple[int, int]] = Counter()
    active: Counter[tuple[int, int]] = Counter()
    targets: Counter[tuple[int, int]] = Counter()
    layers = decoder_layers(model)
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
    for path in trained.adapted:
        matrix = model.get_submodule(path).weight
        assert isinstance(matrix, Tensor)
        targets[(matrix.shape[1], matrix.shape[0])] += 1
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    linears = tuple(
        LinearShape(width, height, count, active[(width, height)], targets[(width, height)])
        for (width, height), count in sorted(counts.items())
    )
    return ModelShape(
        num_parameters=num_parameters,
        linears=linears,
        other_parameters=num_parameters - sum(lin.num_weights * lin.count for lin in linears),
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        trained_whole=_count_whole(model, trained.whole),
    )


def _count_whole(model: Model, paths: Iterable[str]) -> int:
    """Parameters of modules; a shared one counts once."""
    parameters = {id(p): p.numel() for path in paths for p in model.get_submodule(path).parameters()}
    return sum(parameters.values())
