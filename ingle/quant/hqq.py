"""HQQ: codes of few bits with a float16 scale and a free float16 zero for every group of a row.

Legend: O = rows, I = columns, N = groups in a row.

====== ====================== ==========================================================================
plane  shape                  content
====== ====================== ==========================================================================
codes  [O, ceil(I bits / 8)]  a row is one little-endian number, code ``k`` in its bits from ``k * bits`` on
scale  [O, 2 N]               float16 scale of every group, as bytes
zero   [O, 2 N]               float16 zero of every group, as bytes
====== ====================== ==========================================================================

A weight is ``(code - zero) * scale``.  A group never crosses a row; where I is not a multiple of the group size, the
last group of every row is short.  The ``hqq`` package packs the same codes in stripes across rows, so that no row can
be cut out; ``interchange_hqq`` turns one into the other.

The storage is HQQ's, the solver need not be: ``hqq`` is the published one (``hqq_proximal``), which moves the zero
only; ``ingle`` fits scale and zero together, weighted by importance where it is given (``kernels.hqq_search``), and
takes the rounding of both to float16 into account.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (storage, ``hqq`` solver).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.kernels.hqq.dispatch import decode_groups, encode_groups
from ingle.quant.hqq_proximal import solve
from ingle.quant.packed_format import QuantFormat, require_importance
from ingle.quant.plane import PlaneSpec, as_bytes, as_float16

#: The largest float16: scales and zeros end here.
LARGEST = 65504.0
#: Weights that the published solver works on at once; bounds its float32 copies.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Hqq(QuantFormat):
    """Groups with a float scale and zero.

    Attributes:
        bits: Of a code.
        group_size: Consecutive weights of a row that share a scale and a zero.
        solver: Who finds them; the bytes mean the same, so formats that differ in it only are equal.
    """

    bits: int = 4
    group_size: int = 64
    solver: Literal["ingle", "hqq"] = field(default="ingle", compare=False)

    @property
    def additive_field(self) -> int | None:
        """The zero is a float of its own for every group."""
        return self.group_size

    def plane_specs(self, out_features: int, in_features: int) -> dict[str, PlaneSpec]:
        """Name, shape and dtype of every plane."""
        num_groups = -(-in_features // self.group_size)
        return {
            "codes": PlaneSpec((out_features, -(-in_features * self.bits // 8))),
            "scale": PlaneSpec((out_features, 2 * num_groups)),
            "zero": PlaneSpec((out_features, 2 * num_groups)),
        }

    def encode(self, weight_OI: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> dict[str, Tensor]:
        """Packs a weight; ``importance`` ``[I]`` weighs the square errors of the columns (solver ``ingle`` only).

        A group that is constant is held exactly where float16 holds its value.

        Raises:
            QuantizationError: The weight holds NaN or infinity, or is too large for float16; the importance is of
                another length, negative or not finite.
        """
        weight_OI = weight_OI.detach()
        if importance is not None:
            require_importance(importance, weight_OI.shape[1], name)
        self._require_range(weight_OI, name)
        if self.solver == "hqq":
            codes, scale_ON, zero_ON = self._solve(weight_OI)
        else:
            codes, scale_ON, zero_ON = encode_groups(weight_OI, importance, self.bits, self.group_size)
        if not bool((scale_ON.isfinite() & zero_ON.isfinite()).all()):
            raise self.too_large(name, "a scale or a zero is beyond float16")
        planes = {"codes": codes, "scale": as_bytes(scale_ON), "zero": as_bytes(zero_ON)}
        return {plane: tensor.to(weight_OI.device) for plane, tensor in planes.items()}

    def decode_into(self, planes: Mapping[str, Tensor], out_OI: Tensor) -> Tensor:
        """Unpacks with a kernel."""
        scale_ON, zero_ON = as_float16(planes["scale"]), as_float16(planes["zero"])
        return decode_groups(planes["codes"], scale_ON, zero_ON, self.bits, self.group_size, out_OI)

    def decode_reference(
        self, planes: Mapping[str, Tensor], out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpacks to ``[O, I]`` in plain torch."""
        codes_OI = unpack_codes(planes["codes"].detach(), self.bits, in_features).float()
        scale_OI, zero_OI = (
            as_float16(planes[name]).float().repeat_interleave(self.group_size, dim=1)[:, :in_features]
            for name in ("scale", "zero")
        )
        return ((codes_OI - zero_OI) * scale_OI).to(dtype)

    def fold(self, planes: Mapping[str, Tensor], delta_OG: Tensor) -> dict[str, Tensor]:
        """Adds to every weight of a group the same delta, by its zero; codes and scales stay.

        ``(code - zero) * scale + delta`` is ``(code - (zero - delta / scale)) * scale``: the new zero is
        ``zero - delta / scale``, rounded to float16, which moves the delta by at most ``scale * |zero| / 2048``.
        A scale is never zero (an all-zero group has scale 1), so there is always a zero that takes the delta.

        Args:
            planes: As ``plane_specs`` lists them.
            delta_OG: ``[O, N]``, floating: what to add to each weight of each group (for QA-LoRA
                ``s * B A / group_size`` where inputs are averaged, ``s * B A`` where they are summed).

        Returns:
            The planes with another ``zero``.

        Raises:
            QuantizationError: The delta has another shape, or a zero would leave float16's range.
        """
        scale_ON, zero_ON = as_float16(planes["scale"]), as_float16(planes["zero"])
        if delta_OG.shape != zero_ON.shape:
            why = f"need {list(zero_ON.shape)}, got {list(delta_OG.shape)}"
            raise QuantizationError("The delta has another shape than the groups of its weight.", why=why)
        delta_OG = delta_OG.detach().to(scale_ON.device, torch.float64)
        moved_ON = (zero_ON.double() - delta_OG / scale_ON.double()).half()
        if not bool(moved_ON.isfinite().all()):
            raise QuantizationError(
                "The delta is too large to be folded into float16 zeros.",
                why=f"largest delta {float(delta_OG.abs().max())}, smallest scale {float(scale_ON.abs().min())}",
            )
        return {**planes, "zero": as_bytes(moved_ON)}

    def _solve(self, weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and zero by the published solver, some rows at a time."""
        rows = max(1, CHUNK // max(1, weight_OI.shape[1]))
        parts = [self._solve_rows(chunk.float()) for chunk in weight_OI.split(rows)]
        codes, scale_ON, zero_ON = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return codes, scale_ON, zero_ON

    def _solve_rows(self, weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_columns = weight_OI.shape[1]
        whole = num_columns // self.group_size * self.group_size
        parts = []  # a short last group is solved as one of its size
        for part in (weight_OI[:, :whole], weight_OI[:, whole:]):
            if part.shape[1]:
                groups = part.unflatten(1, (-1, min(self.group_size, part.shape[1])))
                codes, scale, zero = solve(groups, self.bits)
                parts.append((codes.flatten(1), scale.squeeze(2), zero.squeeze(2), *groups.aminmax(dim=2)))
        codes, scale, zero, low, high = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        flat = low == high  # the proximal steps do not find a constant: it is held as the zero
        groups = flat.repeat_interleave(self.group_size, dim=1)[:, :num_columns]
        codes = codes.masked_fill(groups, 0).to(torch.uint8)
        scale, zero = torch.where(flat, torch.ones_like(scale), scale), torch.where(flat, -low, zero)
        return pack_codes(codes, self.bits), scale.half(), zero.half()

    def _require_range(self, weight_OI: Tensor, name: str) -> None:
        low, high = (float(bound) for bound in weight_OI.aminmax())
        largest = max(-low, high)
        if not largest < float("inf"):
            raise self.not_finite(weight_OI, name)
        if largest > LARGEST:
            raise self.too_large(name, f"absmax {largest}, and its scales and zeros are float16")


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[O, I]`` to rows of bytes ``[O, ceil(I bits / 8)]``, code ``k`` in bits from ``k * bits`` on."""
    places = torch.arange(bits, dtype=torch.uint8, device=codes_OI.device)
    flags = ((codes_OI.unsqueeze(-1) >> places) & 1).flatten(1)
    flags = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 8))
    return _join_bits(flags.unflatten(1, (-1, 8)))


def unpack_codes(packed_OC: Tensor, bits: int, num_columns: int) -> Tensor:
    """What ``pack_codes`` packed, uint8 ``[O, I]``."""
    places = torch.arange(8, dtype=torch.uint8, device=packed_OC.device)
    flags = ((packed_OC.unsqueeze(-1) >> places) & 1).flatten(1)[:, : num_columns * bits]
    return _join_bits(flags.unflatten(1, (-1, bits)))


def _join_bits(flags: Tensor) -> Tensor:
    """The numbers whose bits are the last dimension, the lowest first, at most eight."""
    places = torch.arange(flags.shape[-1], dtype=torch.uint8, device=flags.device)
    return torch.sum(flags << places, dim=-1, dtype=torch.uint8)
