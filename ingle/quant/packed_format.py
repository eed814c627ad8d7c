"""What every format does in the same way: count its bits, refuse what is no number, and decode with the fastest kernel.

Legend: O = rows, I = columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ingle.errors import QuantizationError
from ingle.kernels.levels.dispatch import has_kernel
from ingle.quant.plane import PlaneSpec, Scratch, count_bits_per_weight


@dataclass(frozen=True)
class QuantFormat(ABC):
    """A member of the axis that :class:`ingle.quant.format.Format` describes; it says what is its own.

    Attributes:
        scratch: Where layers of this format decode, one after the other.
    """

    scratch: Scratch = field(default_factory=Scratch, repr=False, compare=False, kw_only=True)

    @property
    def name(self) -> str:
        """What ``base.format`` calls it."""
        return type(self).__name__.lower()

    @property
    def additive_field(self) -> int | None:
        """Group size of a free additive float: there is none, unless a member says otherwise."""
        return None

    @abstractmethod
    def plane_specs(self, out_features: int, in_features: int) -> dict[str, PlaneSpec]:
        """Name, shape and dtype of every plane."""

    @abstractmethod
    def decode_reference(
        self, planes: Mapping[str, Tensor], out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpacks to ``[O, I]`` in plain torch."""

    @abstractmethod
    def decode_into(self, planes: Mapping[str, Tensor], out_OI: Tensor) -> Tensor:
        """Unpacks with the kernel that :meth:`has_kernel` promised; ``out_OI`` is contiguous, and returned."""

    def has_kernel(self, plane: Tensor, dtype: torch.dtype) -> bool:
        """Whether planes where this one is can be decoded to ``dtype`` by a kernel."""
        return has_kernel(plane, dtype)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Bits one weight takes, scales included."""
        return count_bits_per_weight(self.plane_specs(out_features, in_features), out_features, in_features)

    def granule(self, out_features: int, in_features: int) -> int:
        """Rows that can be cut out of all planes together: each stands alone, unless a member says otherwise."""
        return 1

    def recode(self, codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes of one packing under the scales of another, which tells what changed in the codes alone."""
        return dict(scales) | {"codes": codes["codes"]}

    def decode(
        self,
        planes: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Unpacks to ``[O, I]``, into ``out`` if it is given."""
        plane = next(iter(planes.values()))
        if not self.has_kernel(plane, dtype):
            decode = self.decode if self.has_kernel(plane, torch.float32) else self.decode_reference
            decoded = decode(planes, out_features, in_features, torch.float32).to(dtype)
            return decoded if out is None else out.copy_(decoded)
        if out is None:
            out = torch.empty(out_features, in_features, dtype=dtype, device=plane.device)
        return self.decode_into(planes, out)

    def not_finite(self, weight_OI: Tensor, name: str) -> QuantizationError:
        """The error for a weight that holds NaN or infinity."""
        return QuantizationError(
            f"{name} holds NaN or infinity and cannot be packed as {self.name}.",
            where=name,
            why=f"{int((~weight_OI.isfinite()).sum())} of {weight_OI.numel()} values are not finite",
            fix="check the checkpoint, or train with --base.format=none",
        )

    def too_large(self, name: str, why: str) -> QuantizationError:
        """The error for a weight whose scales the format cannot hold."""
        return QuantizationError(
            f"{name} is too large for {self.name}.",
            where=name,
            why=why,
            fix="check the checkpoint, or train with --base.format=none",
        )


def require_importance(importance: Tensor, num_columns: int, name: str) -> None:
    """Refuses what cannot weigh the columns of a weight.

    Raises:
        QuantizationError: It is of another length, negative or not finite.
    """
    if tuple(importance.shape) != (num_columns,):
        raise QuantizationError(
            f"The importance of {name} has another length than its rows.",
            where=name,
            why=f"need {[num_columns]}, got {list(importance.shape)}",
        )
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise QuantizationError(f"The importance of {name} is negative or not finite in places.", where=name)
