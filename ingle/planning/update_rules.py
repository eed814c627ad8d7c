"""What the rule of the optimizer keeps: moments, masters and gradients by the shapes of a model."""

from __future__ import annotations

from collections.abc import Iterator

from ingle.config.optim import Apollo, GaLore, Lisa, Subspace
from ingle.config.run import Run
from ingle.planning.shape import ModelShape

#: Buffers of a transform of Fastfood, per value: signs, normal factors, values twice, and the permutation.
_FASTFOOD_BYTES = 24


def active_share(run: Run, model: ModelShape) -> float:
    """Returns the share of the layers that have gradients, masters and moments at a time."""
    rule = run.optim.rule
    if isinstance(rule, Subspace):
        return 0.0
    return min(1.0, rule.active / max(1, model.num_layers)) if isinstance(rule, Lisa) else 1.0


def active_parameters(run: Run, model: ModelShape, trained: int) -> float:
    """Returns how many of the trained parameters have gradients, masters and moments at a time."""
    rule = run.optim.rule
    if isinstance(rule, Subspace):
        return 0.0
    if isinstance(rule, Lisa):
        sizes = sorted(size for layer in model.layers for size in [layer.num_parameters] * layer.count)
        return trained - sum(sizes) + sum(sizes[-rule.active :])
    return trained


def state_bytes(run: Run, model: ModelShape, trained: int, ranks: float = 1) -> float:
    """Returns the bytes of moments and projections on one device.

    Args:
        run: The run.
        model: Its model.
        trained: Trained parameters.
        ranks: Ranks that share the moments of AdamW. Those of projected matrices are on every rank.
    """
    rule = run.optim.rule
    if isinstance(rule, Subspace):
        return 8.0 * rule.dim
    projected = list(_projected(run, model))
    plain = active_parameters(run, model, trained) - sum(small * large * count for small, large, count in projected)
    basis = isinstance(rule, GaLore)
    rank = rule.rank if isinstance(rule, GaLore | Apollo) else 0
    return 8 * plain / ranks + sum(4 * rank * (2 * large + small * basis) * count for small, large, count in projected)


def scratch_bytes(run: Run, model: ModelShape) -> float:
    """Returns the bytes of buffers during an update."""
    rule = run.optim.rule
    if isinstance(rule, Subspace) and run.adapter.kind == "none" and rule.projection != "index":
        largest = max(model.embedding_parameters, *(lin.num_weights for lin in model.linears), 1)
        return float(_FASTFOOD_BYTES << (largest - 1).bit_length())
    return 0.0


def _projected(run: Run, model: ModelShape) -> Iterator[tuple[int, int, int]]:
    """Yields smaller side, larger side and number of the matrices that GaLore and APOLLO project."""
    rule = run.optim.rule
    if not isinstance(rule, GaLore | Apollo):
        return
    for layer in model.layers:
        for lin in layer.linears:
            small, large = sorted((lin.in_features, lin.out_features))
            if small > rule.rank and layer.num_experts == 0:  # experts are one tensor of three dimensions
                yield small, large, lin.count * layer.count
