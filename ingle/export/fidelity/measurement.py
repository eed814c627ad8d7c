"""Measures how much of a trained change survives the quantization of each merged weight.

A change smaller than half a quantization step is mostly rounded away, and what remains is noise that has little to do
with the training.  So every merged weight is compared with the same weight quantized without the change:

* **delta / step**: RMS of the trained change over the quantization step, which is ``sqrt(12)`` times the RMS rounding
  error of the merged weight (the step of a uniform grid with that error).
* **codes changed**: share of weights whose integer code differs from the one without the change.
* **correlation**: cosine of the angle between the surviving change and the trained one.
* **gain**: length of the surviving change projected onto the trained one, relative to the trained one.  Rounding that
  behaves like noise keeps it near 1 even if the correlation is low.

Legend: O = rows, I = columns, G = groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ingle.adapters.linear import AdaptedLinear
from ingle.adapters.merging import change
from ingle.export.writers.merged_model import LoadedWeight
from ingle.quant.format import Format
from ingle.quant.linear import QuantLinear

#: Number of weights compared at once; bounds the size of the float64 copies.
_CHUNK_WEIGHTS = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorFidelity:
    """Fidelity of one merged weight.

    Attributes:
        name: Name in the exported files.
        type: Format or data type.
        num_weights: Number of elements.
        delta_rms: RMS of the trained change.
        weight_rms: RMS of the weight without the change.
        step: Quantization step, in the unit of the weights; see the module.
        codes_changed: Share of codes that differ; for plain types, of values.
        correlation: Correlation of the surviving change with the trained one.
        gain: Share of the trained change that survives on average; see the module.
        num_bytes: Size in the exported files.
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
        """RMS of the change in quantization steps."""
        return self.delta_rms / self.step if self.step else math.inf

    @property
    def energy(self) -> float:
        """Sum of squares of the trained change."""
        return self.delta_rms**2 * self.num_weights

    @property
    def lost_energy(self) -> float:
        """Sum of squares of the trained change that did not survive."""
        return (1 - max(self.correlation, 0.0) ** 2) * self.delta_rms**2 * self.num_weights

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        ratio = self.delta_per_step
        return asdict(self) | {"delta_per_step": ratio if math.isfinite(ratio) else None}


def mean_correlation(tensors: Sequence[TensorFidelity]) -> float | None:
    """Returns the mean correlation, weighted by the energy of each change; None if there is no change."""
    total = sum(each.energy for each in tensors)
    return sum(each.correlation * each.energy for each in tensors) / total if total else None


@torch.no_grad()
def measure(
    loaded: LoadedWeight, name: str, target: Format | torch.dtype, importance: Tensor | None = None
) -> tuple[dict[str, Tensor] | Tensor, TensorFidelity]:
    """Merges one weight into ``target`` and measures what survived.

    Returns:
        The merged weight, as planes or as a plain ``[O, I]`` tensor, and the measurement.
    """
    layer = loaded.layer
    assert layer is not None
    rows, columns = layer.out_features, layer.in_features
    weight_OI = layer.dense_weight(torch.float32)
    if isinstance(layer.base, QuantLinear):
        weight_OI = weight_OI.clone()  # the next decode overwrites the format's scratch buffer
    delta_OG = change(layer, weight_OI)
    merged: dict[str, Tensor] | Tensor
    if isinstance(target, torch.dtype):
        merged = (weight_OI + layer.spread(delta_OG)).to(target)
        merged_OI, before_OI = merged.float(), weight_OI.to(target).float()
        changed = float((merged_OI != before_OI).double().mean())
        type_name, num_bytes = str(target).removeprefix("torch."), merged.nbytes
    else:
        merged = loaded.planes(target, importance)
        same = isinstance(layer.base, QuantLinear) and layer.base.format == target
        unmerged = layer.base.planes() if same else target.encode(weight_OI, importance, name=name)  # type: ignore[operator]
        merged_OI = target.decode(merged, rows, columns, torch.float32)
        before_OI = weight_OI if same else target.decode(unmerged, rows, columns, torch.float32)
        changed = _codes_changed(target, unmerged, merged, merged_OI)
        type_name, num_bytes = target.name, sum(plane.nbytes for plane in merged.values())
    sums = _sum_up(weight_OI, layer, delta_OG, merged_OI, before_OI)
    count = rows * columns
    wanted, survived, both = sums["wanted"], sums["survived"], sums["both"]
    return merged, TensorFidelity(
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


def _sum_up(
    weight_OI: Tensor, layer: AdaptedLinear, delta_OG: Tensor, merged_OI: Tensor, before_OI: Tensor
) -> dict[str, float]:
    """Sums squares and products in float64, some rows at a time."""
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
    """Returns the share of codes that differ: the old codes with the merged scales differ in exactly those weights."""
    rows, columns = merged_OI.shape
    mixed_OI = format.decode(format.recode(before, after), rows, columns, torch.float32)
    return float((mixed_OI != merged_OI).double().mean())
