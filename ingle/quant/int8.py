"""int8: one signed byte a weight and one scale a row, as LLM.int8() holds its weights.

Legend: O = rows, I = columns.

====== ======== ======= ===========================================
plane  shape    dtype   content
====== ======== ======= ===========================================
codes  [O, I]   int8    round(weight * 127 / scale), half to even
scale  [O, 4]   uint8   float32 absmax of the row, as bytes
====== ======== ======= ===========================================

A weight is ``code * scale * (1 / 127)`` with bitsandbytes' order of products.  bitsandbytes casts weights to float16
before it encodes; we encode what is there, so codes are equal wherever float16 holds the weight exactly.

Source: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 2; bitsandbytes ``int8_vectorwise_quant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.kernels.decode import decode_int8, encode_int8, has_kernel
from ingle.quant.plane import PlaneSpec, Scratch, as_bytes, as_float32, count_bits_per_weight

#: 1 / 127 as bitsandbytes spells it.
RECIPROCAL = 7.874015718698502e-3


@dataclass(frozen=True)
class Int8:
    """Row-wise absmax int8."""

    scratch: Scratch = field(default_factory=Scratch, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What ``base.format`` calls it."""
        return "int8"

    @property
    def additive_field(self) -> int | None:
        """int8 is symmetric: it has none."""
        return None

    def plane_specs(self, out_features: int, in_features: int) -> dict[str, PlaneSpec]:
        """Name, shape and dtype of every plane."""
        return {
            "codes": PlaneSpec((out_features, in_features), torch.int8),
            "scale": PlaneSpec((out_features, 4)),
        }

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Bits one weight takes, scales included."""
        return count_bits_per_weight(self.plane_specs(out_features, in_features), out_features, in_features)

    def granule(self, out_features: int, in_features: int) -> int:
        """Every row stands alone."""
        return 1

    def encode(self, weight_OI: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> dict[str, Tensor]:
        """Packs a weight; ``importance`` is not used.

        Raises:
            QuantizationError: The weight holds NaN or infinity, or is too large to be decoded.
        """
        weight_OI = weight_OI.detach()
        codes, scale_O = encode_int8(weight_OI) or self.encode_reference(weight_OI)
        if not bool(scale_O.isfinite().all()):
            raise QuantizationError(
                f"{name} holds NaN or infinity and cannot be packed as int8.",
                where=name,
                why=f"{int((~weight_OI.isfinite()).sum())} of {weight_OI.numel()} values are not finite",
                fix="check the checkpoint, or train with --base.format=none",
            )
        if float(scale_O.max()) > torch.finfo(torch.float32).max / 127:
            raise QuantizationError(f"{name} is too large for int8.", where=name, why=f"absmax {float(scale_O.max())}")
        return {"codes": codes, "scale": as_bytes(scale_O.unsqueeze(1))}

    def encode_reference(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Codes ``[O, I]`` and float32 absmax ``[O]`` in plain torch."""
        weight_OI = weight_OI.float()
        scale_O = weight_OI.abs().amax(dim=1)
        # A zero row has nothing to divide by, and a tiny one would divide into infinity.
        factor_O = scale_O.clamp(min=127.0 / torch.finfo(torch.float32).max).reciprocal() * 127.0  # as torch divides
        return (weight_OI * factor_O.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale_O

    def decode(
        self,
        planes: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Unpacks to ``[O, I]``, into ``out`` if it is given."""
        codes = planes["codes"].detach()
        if not has_kernel(codes, dtype):
            decode = self.decode if has_kernel(codes, torch.float32) else self.decode_reference
            decoded = decode(planes, out_features, in_features, torch.float32).to(dtype)
            return decoded if out is None else out.copy_(decoded)
        if out is None:
            out = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
        return decode_int8(codes, as_float32(planes["scale"]).flatten(), out)

    def decode_reference(
        self, planes: Mapping[str, Tensor], out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpacks to ``[O, I]`` in plain torch."""
        return (planes["codes"].detach() * as_float32(planes["scale"]) * RECIPROCAL).to(dtype)
