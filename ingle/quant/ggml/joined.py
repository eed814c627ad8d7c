"""A weight whose rows are stored in several types, because a GGUF file has them in several tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingle.quant.format import Format
from ingle.quant.ggml.blocks import GgmlBlocks
from ingle.quant.plane import PlaneSpec

if TYPE_CHECKING:
    from ingle.kernels.triton.tiles import Tiles


@dataclass(frozen=True)
class JoinedRows(Format):
    """Rows of several formats, each with a plane of its own: ``data``, ``data_1``, ...

    Attributes:
        parts: The format of each tensor of the file.
        sizes: Its number of rows.
        order: The row of the weight for each row of the file; None for the same order.
    """

    parts: tuple[GgmlBlocks, ...]
    sizes: tuple[int, ...]
    order: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The names of the parts, ``q6_k+q4_k``."""
        return "+".join(part.name for part in self.parts)

    def row_group(self, out_features: int, in_features: int) -> int:
        """Returns the number of all rows, because no plane has all of them."""
        return out_features

    def plane_specs(self, out_features: int, in_features: int) -> dict[str, PlaneSpec]:
        """Returns shape and dtype of the plane of each part."""
        specs = [part.plane_specs(size, in_features)["data"] for part, size in zip(self.parts, self.sizes, strict=True)]
        return dict(zip(plane_names(len(specs)), specs, strict=True))

    def encode(self, weight_OI: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> dict[str, Tensor]:
        """Quantizes the rows of each part, see :meth:`Format.encode`."""
        rows = weight_OI if self.order is None else weight_OI[torch.from_numpy(self.order).to(weight_OI.device)]
        split = rows.split(self.sizes)
        planes = [
            part.encode(each, importance, name=name)["data"] for part, each in zip(self.parts, split, strict=True)
        ]
        return dict(zip(plane_names(len(planes)), planes, strict=True))

    def decode(
        self,
        planes: Mapping[str, Tensor],
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """Dequantizes each part with its own kernel, see :meth:`Format.decode`."""
        if out is None:
            out = torch.empty(out_features, in_features, dtype=dtype, device=planes["data"].device)
        order = None if self.order is None else torch.from_numpy(self.order).to(out.device).split(self.sizes)
        for number, (part, place) in enumerate(zip(self.parts, out.split(self.sizes), strict=True)):
            plane = {"data": planes[plane_names(number + 1)[-1]]}
            if order is None:
                part.decode(plane, len(place), in_features, dtype, place)
            else:
                out.index_copy_(0, order[number], part.decode(plane, len(place), in_features, dtype))
        return out

    def decode_reference(
        self, planes: Mapping[str, Tensor], out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Dequantizes planes to ``[O, I]`` in plain torch."""
        names = plane_names(len(self.parts))
        rows = torch.cat(
            [
                part.decode_reference({"data": planes[key]}, size, in_features, dtype)
                for part, key, size in zip(self.parts, names, self.sizes, strict=True)
            ]
        )
        return rows if self.order is None else rows[torch.from_numpy(np.argsort(self.order)).to(rows.device)]

    def decode_into(self, planes: Mapping[str, Tensor], out_OI: Tensor) -> Tensor:
        """Dequantizes each part into a contiguous tensor."""
        rows, columns = out_OI.shape
        return self.decode(planes, rows, columns, out_OI.dtype, out_OI)

    def has_kernel(self, plane: Tensor, dtype: torch.dtype) -> bool:
        """Returns False: no kernel reads several planes; :meth:`decode` calls those of the parts."""
        return False

    def tiles(self, planes: Mapping[str, Tensor], out_features: int, in_features: int) -> Tiles:
        """Fails, because :meth:`has_kernel` returns False."""
        raise AssertionError("a weight of several types has no tiles")


def plane_names(count: int) -> list[str]:
    """Returns the names of the planes of so many parts."""
    return ["data", *(f"data_{number}" for number in range(1, count))]
