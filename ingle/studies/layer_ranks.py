"""How many directions each layer of a trained low-rank adapter uses, and ranks by layer that follow from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

Floats = npt.NDArray[np.float64]

#: Share of the squared norm of a change that the counted directions hold.
ENERGY = 0.9
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LayerRank:
    """Directions that a layer uses.

    Attributes:
        path: Path of the layer.
        energy: Share of the adapter's squared norm that is in this layer, the mean over seeds.
        rank: Singular directions that hold 90 % of the change's squared norm, the median over seeds.
        low: The fewest over seeds.
        high: The most over seeds.
    """

    path: str
    energy: float
    rank: int
    low: int
    high: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures."""
        return asdict(self)


def read_spectra(folder: Path) -> dict[str, Floats]:
    """Returns the squared singular values of ``B A`` by the path of each layer of a saved adapter."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        if (match := _KEY.fullmatch(key)) is not None:
            parts.setdefault(match["path"], {})[match["part"]] = value.double()
    found: dict[str, Floats] = {}
    for path, pair in parts.items():
        if pair.keys() == {"A", "B"}:
            _, right = torch.linalg.qr(pair["A"].t())
            _, left = torch.linalg.qr(pair["B"])
            found[path] = torch.linalg.svdvals(left @ right.t()).square().numpy()
    return found


def layer_ranks(spectra: Sequence[Mapping[str, Floats]]) -> list[LayerRank]:
    """Returns the directions that each layer uses, from the spectra of several seeds."""
    totals = [sum(values.sum() for values in each.values()) or 1.0 for each in spectra]
    rows = []
    for path in spectra[0]:
        counts = sorted(_count(each[path]) for each in spectra)
        energy = float(np.mean([each[path].sum() / total for each, total in zip(spectra, totals, strict=True)]))
        rows.append(LayerRank(path, energy, counts[len(counts) // 2], counts[0], counts[-1]))
    return rows


def distribute(spectra: Sequence[Mapping[str, Floats]], rank: int) -> dict[str, int]:
    """Distributes ``rank`` directions per layer so that they hold the most of the measured change.

    Every layer gets one, and at most four times ``rank``. The sum stays the same, so layers of unequal sizes may give
    another number of parameters.
    """
    paths = list(spectra[0])
    gains = [
        (float(np.mean([each[path][place] for each in spectra])), path)
        for path in paths
        for place in range(1, min(4 * rank, min(len(each[path]) for each in spectra)))
    ]
    ranks = dict.fromkeys(paths, 1)
    for _, path in sorted(gains, key=lambda gain: (-gain[0], gain[1]))[: (rank - 1) * len(paths)]:
        ranks[path] += 1
    return ranks


def _count(squares: Floats) -> int:
    total = squares.sum()
    return int(np.searchsorted(np.cumsum(squares), ENERGY * total) + 1) if total > 0 else 0
