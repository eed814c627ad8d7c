"""Initial values of A and B that follow from training data: from gradients of the base (LoRA-GA), or from inputs (EVA).

Legend: O out_features, I in_features, R rank, K directions that were found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ingle.adapters.lora import LoraLinear
from ingle.adapters.norms import start_magnitudes
from ingle.config.adapter import DoraAdapter, InitOptions, LoraAdapter
from ingle.errors import AdapterError
from ingle.parallel import copy_rows, is_sharded, local


class Directions(NamedTuple):
    """The principal directions of a matrix ``[O, I]``, largest first.

    Attributes:
        left: ``[O, K]``.
        sizes: ``[K]``.
        right: ``[K, I]``.
    """

    left: Tensor
    sizes: Tensor
    right: Tensor


def require_directions(layers: Mapping[str, LoraLinear]) -> None:
    """Makes sure that gradients have directions for A and others for B.

    Raises:
        AdapterError: A rank is too large.
    """
    for path, layer in layers.items():
        largest = min(layer.out_features, layer.in_features) // 2
        if layer.rank > largest:
            raise AdapterError(
                f"{path} has {2 * largest} directions, fewer than twice the rank {layer.rank}.",
                where="adapter.init = lora_ga",
                why=f"its weight is [{layer.out_features}, {layer.in_features}]; A and B begin with different ones",
                fix=f"--adapter.rank={largest}, or name a rank for it in adapter.rank_pattern",
            )


@torch.no_grad()
def start_from_gradients(layers: Mapping[str, LoraLinear], found: Mapping[str, Directions], how: InitOptions) -> None:
    """Begins A with the R largest directions of the gradient of the base, and B with the next R.

    What they begin with is subtracted. B is scaled by the sizes of its directions, as in PEFT's ``lora_ga_init``.

    Source: Wang et al. 2024, "LoRA-GA" (arXiv 2407.05000), algorithm 1.
    """
    for path, layer in layers.items():
        rank, directions = layer.rank, found[path]
        a_RI = directions.right[:rank]
        b_OR = directions.left[:, rank : 2 * rank] * directions.sizes[rank : 2 * rank]
        if how.scale == "stable":
            b_OR = b_OR * (layer.out_features**0.25 / how.gamma**0.5)
        assert layer.initial_a is not None and layer.initial_b is not None
        for target, value in (
            (layer.lora_a, a_RI),
            (layer.lora_b, b_OR),
            (layer.initial_a, a_RI),
            (layer.initial_b, b_OR),
        ):
            copy_rows(target, value)


@torch.no_grad()
def start_from_inputs(
    model: nn.Module,
    adapter: LoraAdapter | DoraAdapter,
    layers: Mapping[str, LoraLinear],
    right: Mapping[str, Tensor],
    shares: Mapping[str, Tensor],
) -> LoraAdapter | DoraAdapter:
    """Begins A with the principal directions of the inputs, and moves ranks to layers whose inputs have more of them.

    Args:
        model: The model.
        adapter: The section that was inserted.
        layers: Its layers.
        right: Directions of each layer's inputs, ``[K, I]``.
        shares: The share of the inputs' squares along each, ``[K]``.

    Returns:
        The section with the ranks that the layers have now.

    Raises:
        AdapterError: Ranks would change, and are shared by several processes.

    Source: Paischer et al. 2024, "EVA" (arXiv 2410.07170), algorithm 1; without subtracting the mean.
    """
    ranks = {path: layer.rank for path, layer in layers.items()}
    if adapter.init_options.rho > 1 and not adapter.rank_pattern:
        if any(is_sharded(layer.lora_a) for layer in layers.values()):
            raise AdapterError(
                "EVA cannot move ranks between layers of a sharded model.",
                where="adapter.init_options.rho, parallel.kind",
                fix="--adapter.init_options.rho=1, or --parallel.kind=ddp",
            )
        ranks = move_ranks(shares, ranks, adapter.init_options.rho)
    for path, layer in layers.items():
        rank = ranks[path]
        if rank != layer.rank:
            _resize(layer, rank, adapter)
        copy_rows(layer.lora_a, right[path][:rank])
        local(layer.lora_b).zero_()
    start_magnitudes(model)
    changed = {path: rank for path, rank in ranks.items() if rank != adapter.rank}
    return adapter if adapter.rank_pattern else adapter.model_copy(update={"rank_pattern": changed})


def move_ranks(shares: Mapping[str, Tensor], ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """Returns ranks with the same sum: the directions with the largest shares over all layers, at least one of each.

    Args:
        shares: Shares of each layer's directions, largest first.
        ranks: Ranks of the layers.
        rho: A layer has at most this multiple of its rank.
    """
    places = [
        (-float(share), path, index)
        for path, values in shares.items()
        for index, share in enumerate(values[: round(rho * ranks[path])])
    ]
    first = [place for place in places if place[2] == 0]
    rest = sorted(place for place in places if place[2] > 0)
    found = dict.fromkeys(ranks, 0)
    for _, path, _ in [*first, *rest][: max(len(first), sum(ranks.values()))]:
        found[path] += 1
    return found


def _resize(layer: LoraLinear, rank: int, adapter: LoraAdapter | DoraAdapter) -> None:
    """Gives a layer another rank; nothing is trained yet."""
    device = layer.lora_a.device
    for key, shape in (("lora_a", (rank, layer.lora_a.shape[1])), ("lora_b", (layer.out_features, rank))):
        trained = getattr(layer, key).requires_grad
        setattr(layer, key, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device), requires_grad=trained))
    layer.scale = adapter.scale_at(rank)
