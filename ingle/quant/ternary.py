"""ternary: -1, 0 and 1 times the mean size of the weights, as BitNet b1.58 holds them.

Legend: O = rows, I = columns, N = groups in a row, S = rows of scales.

====== =================== ==========================================================================
plane  shape               content
====== =================== ==========================================================================
codes  [O, ceil(I / 4)]    weight / scale + 1, four codes a byte, the first column in the lowest bits
scale  [S, 2 N]            float16; for the whole tensor S = N = 1, for every row N = 1 and S = O
====== =================== ==========================================================================

The scale is the mean size, rounded to what bfloat16 and float16 both hold: a decoded weight is then the same number
in every dtype, and GGUF's ternary formats, whose scales are float16, hold the very same weights.  A weight beyond half
the scale becomes 1 or -1.  Groups that are ternary already (all weights that are not zero are of one size) keep that
size for a scale, so that packing them changes nothing.

Source: Ma et al. 2024, "The Era of 1-bit LLMs" (arXiv 2402.17764), equations 1 to 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ingle.config.base import TernaryGroups
from ingle.kernels.hqq.dispatch import decode_groups
from ingle.kernels.levels.dispatch import encode_ternary, measure_groups
from ingle.quant.packed_format import QuantFormat
from ingle.quant.plane import PlaneSpec, as_bytes, as_float16

#: Weights measured and encoded at once by the torch implementation; bounds its float32 copies.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Ternary(QuantFormat):
    """Ternary weights with one scale for the tensor, for every row, or for groups of a row.

    Attributes:
        group_size: ``tensor``, ``row``, or consecutive weights of a row that share a scale.
    """

    group_size: TernaryGroups = "tensor"

    def width(self, in_features: int) -> int:
        """Weights of a row that share a scale, as a multiple of eight."""
        return self.group_size if isinstance(self.group_size, int) else -(-in_features // 8) * 8

    def plane_specs(self, out_features: int, in_features: int) -> dict[str, PlaneSpec]:
        """Name, shape and dtype of every plane."""
        rows = 1 if self.group_size == "tensor" else out_features
        num_groups = -(-in_features // self.width(in_features))
        return {"codes": PlaneSpec((out_features, -(-in_features // 4))), "scale": PlaneSpec((rows, 2 * num_groups))}

    def encode(self, weight_OI: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> dict[str, Tensor]:
        """Packs a weight; ``importance`` is not used.

        Raises:
            QuantizationError: The weight holds NaN or infinity, or is too large for a float16 scale.
        """
        weight_OI = weight_OI.detach()
        codes, scale_SN = self._encode(weight_OI, fast=True)
        if not bool(scale_SN.isfinite().all()):
            if not bool(weight_OI.isfinite().all()):
                raise self.not_finite(weight_OI, name)
            raise self.too_large(name, f"absmax {float(weight_OI.abs().max())}, and its scales are float16")
        return {"codes": codes, "scale": as_bytes(scale_SN)}

    def encode_reference(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[O, ceil(I / 4)]`` and float16 scales ``[S, N]`` in plain torch."""
        return self._encode(weight_OI, fast=False)

    def _encode(self, weight_OI: Tensor, *, fast: bool) -> tuple[Tensor, Tensor]:
        num_columns = weight_OI.shape[1]
        width = self.width(num_columns)
        chunks = weight_OI.split(max(1, CHUNK // max(1, num_columns)))
        sizes = measure_groups(weight_OI, width) if fast else None
        if sizes is None:
            total, least, most = (torch.cat(part) for part in zip(*(measure(c, width) for c in chunks), strict=True))
            sizes = total, least, most
        scale_SN = self._scale(*sizes, num_columns)
        scale_ON = scale_SN.float().expand(weight_OI.shape[0], -1)
        codes = encode_ternary(weight_OI, scale_ON / 2, width) if fast else None
        if codes is None:
            limits = (scale_ON / 2).split(chunks[0].shape[0]) if chunks else ()
            codes = torch.cat([pack(*each, width) for each in zip(chunks, limits, strict=True)])
        return codes, scale_SN

    def _scale(self, sum_ON: Tensor, least_ON: Tensor, most_ON: Tensor, num_columns: int) -> Tensor:
        """float16 scales ``[S, N]`` from the sum of sizes, the least that is not zero and the largest."""
        width = self.width(num_columns)
        starts = torch.arange(0, num_columns, width, device=sum_ON.device)
        count = (num_columns - starts).clamp(max=width)
        if self.group_size == "tensor":
            count = count * len(sum_ON)
            sum_ON, least_ON, most_ON = sum_ON.sum(0, True), least_ON.amin(0, True), most_ON.amax(0, True)
        mean_SN = (sum_ON / count).to(torch.bfloat16)
        return torch.where(least_ON >= most_ON, most_ON.half(), mean_SN.half())

    def decode_into(self, planes: Mapping[str, Tensor], out_OI: Tensor) -> Tensor:
        """Unpacks with a kernel."""
        scale_ON = as_float16(planes["scale"]).expand(len(out_OI), -1).contiguous()
        return decode_groups(
            planes["codes"], scale_ON, torch.ones_like(scale_ON), 2, self.width(out_OI.shape[1]), out_OI
        )

    def decode_reference(
        self, planes: Mapping[str, Tensor], out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpacks to ``[O, I]`` in plain torch."""
        codes = planes["codes"].detach()
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
        codes_OI = (codes.unsqueeze(-1) >> shifts & 3).flatten(1)[:, :in_features]
        scale_ON = as_float16(planes["scale"]).float().expand(out_features, -1)
        scale_OI = spread(scale_ON, self.width(in_features), in_features)
        return ((codes_OI.float() - 1) * scale_OI).to(dtype)


def spread(values_ON: Tensor, width: int, num_columns: int) -> Tensor:
    """One value for every column, from one for every group."""
    return values_ON.repeat_interleave(width, dim=1)[:, :num_columns]


def measure(weight_OI: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every group the sum of sizes in float64, the least size that is not zero (else infinity) and the largest."""
    size_OI = torch.nn.functional.pad(weight_OI.float().abs(), (0, -weight_OI.shape[1] % width))
    size_ONW = size_OI.unflatten(1, (-1, width))
    least_ON = torch.where(size_ONW > 0, size_ONW, torch.inf).amin(-1)
    return size_ONW.double().sum(-1), least_ON, size_ONW.amax(-1)


def pack(weight_OI: Tensor, limit_ON: Tensor, width: int) -> Tensor:
    """Codes of weights below, within and above plus or minus a limit, packed."""
    limit_OI = spread(limit_ON, width, weight_OI.shape[1])
    weight_OI = weight_OI.float()
    return pack_codes(((weight_OI > limit_OI).to(torch.uint8) + 1) - (weight_OI < -limit_OI).to(torch.uint8))


def pack_codes(codes_OI: Tensor) -> Tensor:
    """Four codes of two bits a byte, the first in the lowest bits; missing columns count as zero bits."""
    fields = torch.nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % 4)).unflatten(1, (-1, 4))
    packed: Tensor = (fields << torch.arange(0, 8, 2, dtype=torch.uint8, device=codes_OI.device)).sum(
        -1, dtype=torch.uint8
    )
    return packed
