"""How much of a trained change survives in each weight that is packed anew.

A change smaller than half a quantization step is mostly rounded away, and what survives is noise that has little to do
with what was trained.  So every merged weight is compared with the same weight packed without the change:

* **delta / step**: rms of the wanted change over the quantization step, ``sqrt(12)`` times the rms rounding error of
  the merged weight (the step of a uniform grid with that error).
* **codes changed**: share of the weights whose integer code is another one than without the change.
* **correlation**: cosine of the angle between the change that survived and the one that was wanted.
* **gain**: how large the survived change is along the wanted one; rounding that behaves like noise keeps it near 1
  even where the correlation is low.

Legend: O = rows, I = columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ingle.export.merging import Loaded
from ingle.quant.format import Format
from ingle.quant.linear import QuantLinear

#: Rows compared at once; bounds the float32 copies.
_CHUNK_WEIGHTS = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorFidelity:
    """What became of one merged weight.

    Attributes:
        name: As the export calls it.
        type: What it is packed in.
        num_weights: How many there are.
        delta_rms: Rms of the wanted change.
        weight_rms: Rms of the weight without it.
        step: Quantization step; see the module.
        codes_changed: Share of codes that differ; of a plain type, of the numbers.
        correlation: Between survived and wanted change.
        gain: Length of the survived change along the wanted one.
        num_bytes: Bytes it takes.
    """

    name: str
    type: str
    num_weights: int
    delta_rms: float
    weight_rms: float
    step: float
    codes_changed: float
    correlation: float
    gain: float
    num_bytes: int

    @property
    def delta_per_step(self) -> float:
        """Rms of the change over the quantization step."""
        return self.delta_rms / self.step if self.step else math.inf

    @property
    def lost_energy(self) -> float:
        """Squares of the wanted change that did not survive."""
        return (1 - max(self.correlation, 0.0) ** 2) * self.delta_rms**2 * self.num_weights

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        ratio = self.delta_per_step
        return asdict(self) | {"delta_per_step": ratio if math.isfinite(ratio) else None}


def mean_correlation(tensors: Sequence[TensorFidelity]) -> float | None:
    """Correlation over all merged weights, each counted by the energy of its change; None where there are none."""
    energy = [each.delta_rms**2 * each.num_weights for each in tensors]
    if not sum(energy):
        return None
    return sum(each.correlation * e for each, e in zip(tensors, energy, strict=True)) / sum(energy)


@torch.no_grad()
def measure(
    loaded: Loaded, name: str, target: Format | torch.dtype, importance: Tensor | None = None
) -> tuple[dict[str, Tensor] | Tensor, TensorFidelity]:
    """Merges one weight into ``target`` and says what survived.

    Returns:
        Planes, or a ``[O, I]`` tensor where the target is a plain type; and the measurement.
    """
    layer = loaded.layer
    assert layer is not None
    rows, columns = layer.out_features, layer.in_features
    weight_OI = layer.dense_weight(torch.float32)
    if isinstance(layer.base, QuantLinear):
        weight_OI = weight_OI.clone()  # it lies in the format's scratch
    delta_OG = layer.delta()
    packed: dict[str, Tensor] | Tensor
    if isinstance(target, torch.dtype):
        packed = (weight_OI + layer.spread(delta_OG)).to(target)
        merged_OI, before_OI = packed.float(), weight_OI.to(target).float()
        changed = float((merged_OI != before_OI).double().mean())
        type_name, num_bytes = str(target).removeprefix("torch."), packed.nbytes
    else:
        packed = loaded.planes(target, importance)
        same = isinstance(layer.base, QuantLinear) and layer.base.format == target
        unmerged = layer.base.planes() if same else target.encode(weight_OI, importance, name=name)  # type: ignore[operator]
        merged_OI = target.decode(packed, rows, columns, torch.float32)
        before_OI = weight_OI if same else target.decode(unmerged, rows, columns, torch.float32)
        changed = _codes_changed(target, unmerged, packed, merged_OI)
        type_name, num_bytes = target.name, sum(plane.nbytes for plane in packed.values())
    sums = _sum_up(weight_OI, layer, delta_OG, merged_OI, before_OI)
    count = rows * columns
    wanted, survived, both = sums["wanted"], sums["survived"], sums["both"]
    return packed, TensorFidelity(
        name=name,
        type=type_name,
        num_weights=count,
        delta_rms=math.sqrt(wanted / count),
        weight_rms=math.sqrt(sums["weight"] / count),
        step=math.sqrt(12 * sums["error"] / count),
        codes_changed=changed,
        correlation=both / math.sqrt(wanted * survived) if wanted and survived else 0.0,
        gain=both / wanted if wanted else 0.0,
        num_bytes=num_bytes,
    )


def _sum_up(weight_OI: Tensor, layer: Any, delta_OG: Tensor, merged_OI: Tensor, before_OI: Tensor) -> dict[str, float]:
    """Sums of squares and products, some rows at a time, in float64."""
    sums = dict.fromkeys(("weight", "wanted", "survived", "both", "error"), 0.0)
    rows = max(1, _CHUNK_WEIGHTS // weight_OI.shape[1])
    for start in range(0, len(weight_OI), rows):
        part = slice(start, start + rows)
        wanted = layer.spread(delta_OG[part]).double()
        weight, merged = weight_OI[part].double(), merged_OI[part].double()
        survived = merged - before_OI[part].double()
        sums["weight"] += float(weight.square().sum())
        sums["wanted"] += float(wanted.square().sum())
        sums["survived"] += float(survived.square().sum())
        sums["both"] += float((survived * wanted).sum())
        sums["error"] += float((merged - weight - wanted).square().sum())
    return sums


def _codes_changed(
    format: Format, before: Mapping[str, Tensor], after: Mapping[str, Tensor], merged_OI: Tensor
) -> float:
    """Share of codes that differ: with the merged scales put over the old codes, exactly those weights differ."""
    rows, columns = merged_OI.shape
    mixed_OI = format.decode(format.recode(before, after), rows, columns, torch.float32)
    return float((mixed_OI != merged_OI).double().mean())
