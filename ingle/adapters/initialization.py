"""Values that A and B begin with, from a generator or from the base.

The base itself never changes: a start with ``B A != 0`` is subtracted, see :class:`ingle.adapters.LoraLinear`.

Legend: O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ingle.adapters.lora import LoraLinear, generator_of
from ingle.adapters.merging import base_weight
from ingle.config.adapter import READS_DATA, LowRankAdapter, WeightAdapter
from ingle.errors import AdapterError
from ingle.parallel import Mesh, copy_rows, each_gathered
from ingle.quant.linear import QuantLinear

#: Number of weights above which the principal directions are computed by subspace iteration.
EXACT_SVD_WEIGHTS = 1 << 20
_ITERATIONS = 4
_OVERSAMPLING = 8


def set_initial_values(
    model: nn.Module,
    layers: dict[str, LoraLinear],
    adapter: LowRankAdapter,
    seed: int,
    mesh: Mesh | None = None,
    original: Callable[[str], Tensor] | None = None,
) -> None:
    """Sets A and B of new adapters; all ranks call it together.

    Args:
        model: The model, with its weights loaded.
        layers: Adapted layers by path.
        adapter: The section that was inserted.
        seed: Seed of the run. A draw depends on it and on the path, not on the order of layers.
        mesh: The ranks; rank 0 decomposes weights for all of them, because its rounding is not that of other machines.
        original: Reads a weight of the files before it was quantized, ``[O, I]``, by the path of its layer; ``loftq``
            needs it on rank 0.

    Raises:
        AdapterError: A rank is larger than a weight allows, or the files have no weights before quantization.
    """
    init = adapter.init if isinstance(adapter, WeightAdapter) else "kaiming"
    if init == "kaiming" or init in READS_DATA:  # data come later
        for path, layer in layers.items():
            layer.initialize(seed, path)
        return
    found: dict[str, tuple[Tensor, Tensor]] = {}
    reads_base = init in ("pissa", "olora", "loftq")
    if init == "loftq":
        layers = _quantized(layers, seed, original)
    if reads_base:
        _require_directions(layers, init)
    for path, layer in each_gathered(model, layers) if reads_base else layers.items():
        if mesh is None or mesh.is_main:
            weight_OI = base_weight(layer) if reads_base else None
            if init == "loftq" and original is not None and weight_OI is not None:
                weight_OI = original(path).to(weight_OI) - weight_OI
            found[path] = _factors(init, layer, weight_OI, generator_of(seed, path))
        if mesh is not None:
            found[path] = mesh.broadcast(found.get(path))
    for path, layer in layers.items():  # when no unit is gathered, to write into what the ranks keep
        a_RI, b_OR = found.pop(path)
        for target, value in ((layer.lora_a, a_RI), (layer.lora_b, b_OR)):
            copy_rows(target, value)
        if layer.initial_a is not None and layer.initial_b is not None:
            copy_rows(layer.initial_a, a_RI)
            copy_rows(layer.initial_b, b_OR)
        elif init == "loftq":
            layer.starts_at_base = False


def _quantized(
    layers: dict[str, LoraLinear], seed: int, original: Callable[[str], Tensor] | None
) -> dict[str, LoraLinear]:
    """Returns the layers from which quantization took something; the others begin as with ``kaiming``."""
    found = {path: layer for path, layer in layers.items() if isinstance(layer.base, QuantLinear)}
    if original is None or not found:
        raise AdapterError(
            "LoftQ needs the weights before they are quantized.",
            where="adapter.init = loftq",
            why="no adapted layer is quantized" if not found else "the weights were not given",
            fix="--adapter.init=pissa",
        )
    for path, layer in layers.items():
        if path not in found:
            layer.initialize(seed, path)
    return found


def _require_directions(layers: dict[str, LoraLinear], init: str) -> None:
    for path, layer in layers.items():
        largest = min(layer.out_features, layer.in_features)
        if layer.rank > largest:
            raise AdapterError(
                f"{path} has {largest} directions, fewer than the rank {layer.rank}.",
                where=f"adapter.init = {init}",
                why=f"its weight is [{layer.out_features}, {layer.in_features}]",
                fix=f"--adapter.rank={largest}, or name a rank for it in adapter.rank_pattern",
            )


def _factors(
    init: str, layer: LoraLinear, weight_OI: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns A [R, I] and B [O, R], float32, on the CPU; some decompose a weight."""
    out_features, in_features, rank = layer.out_features, layer.in_features, layer.rank
    if init == "gaussian":
        return torch.randn(rank, in_features, generator=generator) / rank, torch.zeros(out_features, rank)
    if init == "orthogonal":
        return orthogonal(out_features, in_features, rank, generator)
    assert weight_OI is not None
    a_RI, b_OR = olora(weight_OI, rank) if init == "olora" else pissa(weight_OI, rank, layer.scale, generator)
    return a_RI.cpu(), b_OR.cpu()


def orthogonal(out_features: int, in_features: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws A and B whose ranks span orthogonal spaces, so that B A = 0.

    Source: PEFT's ``orthogonal_init``.
    """
    q_RR, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    a_IR = torch.randn(in_features, rank // 2, generator=generator) @ q_RR[0::2] / 10
    b_OR = torch.randn(out_features, rank // 2, generator=generator) @ q_RR[1::2] / 10
    return a_IR.t().contiguous(), b_OR


def pissa(weight_OI: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits the R largest singular values of a weight evenly between A and B; ``scale * B A`` is their part of it.

    Source: Meng et al. 2024, "PiSSA" (arXiv 2404.02948), equations 2 and 3.
    """
    u_OR, s_R, v_RI = principal_directions(weight_OI, rank, generator)
    root_R = (s_R / scale).sqrt()
    return root_R[:, None] * v_RI, u_OR * root_R


def principal_directions(weight_OI: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the R largest singular values of a matrix and their vectors: ``[O, R]``, ``[R]``, ``[R, I]``.

    Matrices of more than ``EXACT_SVD_WEIGHTS`` weights are decomposed by subspace iteration.

    Source: Halko et al. 2011 (arXiv 0909.4061), algorithm 4.4.
    """
    if weight_OI.numel() <= EXACT_SVD_WEIGHTS:
        u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        width = min(rank + _OVERSAMPLING, *weight_OI.shape)
        start_IK = torch.randn(weight_OI.shape[1], width, generator=generator).to(weight_OI.device)
        q_OK, _ = torch.linalg.qr(weight_OI @ start_IK)
        for _ in range(_ITERATIONS):
            q_IK, _ = torch.linalg.qr(weight_OI.t() @ q_OK)
            q_OK, _ = torch.linalg.qr(weight_OI @ q_IK)
        u_KK, s_K, v_KI = torch.linalg.svd(q_OK.t() @ weight_OI, full_matrices=False)
        u_OK = q_OK @ u_KK
    return u_OK[:, :rank], s_K[:rank], v_KI[:rank]


def olora(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the first R rows and columns of the QR decomposition of a weight: ``R[:rank]`` and ``Q[:, :rank]``.

    It goes column by column, so the first R columns of the weight decide Q.

    Source: Büyükakyüz 2024, "OLoRA" (arXiv 2406.01775), algorithm 1.
    """
    q_OR, _ = torch.linalg.qr(weight_OI[:, :rank])
    return q_OR.t() @ weight_OI, q_OR
