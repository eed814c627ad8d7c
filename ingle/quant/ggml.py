"""What the formats of GGUF files share: rows of blocks, held as the very bytes of the file.

Legend: O = rows, I = columns, N = blocks in a row, S = weights of a block, B = bytes of a block.

====== ============ ======= ==========================================
plane  shape        dtype   content
====== ============ ======= ==========================================
data   [O, N B]     uint8   the blocks of every row, as in the file
====== ============ ======= ==========================================

A format says how the bytes of one block become weights, in plain torch.  Packing follows ggml's reference to the byte;
it runs on the CPU wherever the weight is, since a search for scales whose last bit depends on the order of sums is
written once.

Source: ggml's ``ggml-common.h`` and ``ggml-quants.c``; the ``gguf`` package's ``quants.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ingle.config.ggml import GgmlBase
from ingle.errors import QuantizationError
from ingle.kernels.ggml.dispatch import decode_blocks, encode_blocks, has_kernel
from ingle.quant.packed_format import QuantFormat, require_importance
from ingle.quant.plane import PlaneSpec

#: From here on a scale may be too large for float16.
LARGE = 60000.0


@dataclass(frozen=True)
class GgmlBlocks(QuantFormat):
    """A format of blocks; a member names its config section and says how a block is unpacked.

    Attributes:
        base: Its section of the config.
        scale_bytes: Bytes of a block that hold scales and offsets, not codes: first and end of each run; empty where
            no block is packed.
        uses_importance: Whether packing weighs its error by an importance matrix.
    """

    base: ClassVar[type[GgmlBase]]
    scale_bytes: ClassVar[tuple[tuple[int, int], ...]] = ()
    uses_importance: ClassVar[bool] = True

    @property
    def block_size(self) -> int:
        """Weights of a block."""
        return self.base.block_size

    @abstractmethod
    def unpack(self, blocks_ONB: Tensor) -> Tensor:
        """The float32 weights ``[O, N, S]`` of uint8 blocks, in the ``gguf`` package's order of products."""

    def plane_specs(self, out_features: int, in_features: int) -> dict[str, PlaneSpec]:
        """Name, shape and dtype of every plane; a last block that is not whole counts as one."""
        num_blocks = -(-in_features // self.base.block_size)
        return {"data": PlaneSpec((out_features, num_blocks * self.base.block_bytes))}

    def recode(self, codes: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes of one packing under the scales of another."""
        mixed_ONB, from_ONB = (
            planes["data"].unflatten(1, (-1, self.base.block_bytes)).clone() for planes in (codes, scales)
        )
        for first, end in self.scale_bytes:
            mixed_ONB[..., first:end] = from_ONB[..., first:end]
        return {"data": mixed_ONB.flatten(1)}

    def encode(self, weight_OI: Tensor, importance: Tensor | None = None, *, name: str = "weight") -> dict[str, Tensor]:
        """Packs a weight as ggml's reference does; with ``importance`` ``[I]`` as ggml does with an importance matrix.

        Raises:
            QuantizationError: The format is only read; the weight holds NaN or infinity, is too large, or has rows
                that are not whole blocks; the importance is of another length, negative or not finite.
        """
        num_rows, num_columns = weight_OI.shape
        if self.base.read_only is not None:
            raise QuantizationError(
                f"{name} cannot be packed as {self.name}, which is only read.",
                where=name,
                why=self.base.read_only,
                fix="train on a downloaded .gguf file in that type, or choose another --base.format",
            )
        self._require_whole_blocks(num_columns, name)
        if importance is not None:
            require_importance(importance, num_columns, name)
        data = torch.empty(self.plane_specs(num_rows, num_columns)["data"].shape, dtype=torch.uint8)
        used = importance if self.uses_importance else None
        lowest, highest = encode_blocks(self.name, weight_OI, used, data)
        largest = max(-lowest, highest)
        if not largest < float("inf"):
            raise self.not_finite(weight_OI, name)
        planes = {"data": data.to(weight_OI.device)}
        if largest > LARGE:
            decoded = self.decode(planes, num_rows, num_columns, torch.float32).abs().max()
            if not largest / 4 < float(decoded) < 4 * largest:
                raise self.too_large(name, f"absmax {largest}, and its scales are float16")
        return planes

    def decode_into(self, planes: Mapping[str, Tensor], out_OI: Tensor) -> Tensor:
        """Unpacks with a kernel."""
        return decode_blocks(self.name, planes["data"], out_OI)

    def has_kernel(self, plane: Tensor, dtype: torch.dtype) -> bool:
        """Whether blocks where this plane is can be decoded to ``dtype`` by a kernel."""
        return has_kernel(plane, dtype)

    def decode_reference(
        self, planes: Mapping[str, Tensor], out_features: int, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpacks to ``[O, I]`` in plain torch."""
        blocks_ONB = planes["data"].detach().unflatten(1, (-1, self.base.block_bytes))
        return self.unpack(blocks_ONB).flatten(1).to(dtype)

    def _require_whole_blocks(self, num_columns: int, name: str) -> None:
        size = self.base.block_size
        if num_columns % size == 0:
            return
        fallback = self.base.fallback if self.base.fallback is not None and num_columns % 32 == 0 else None
        stands_in = "float16" if fallback is None else fallback.upper()
        raise QuantizationError(
            f"{name} has rows of {num_columns} weights, which are not whole blocks of {size} of {self.name}.",
            where=name,
            why=f"a block never crosses a row; llama.cpp packs such a matrix as {stands_in}",
            fix=f"--base.format={fallback or 'nf4'}",
        )


def half(blocks_ONB: Tensor, first: int) -> Tensor:
    """The float16 at a byte of every block, as float32 ``[O, N, 1]``."""
    return blocks_ONB[..., first : first + 2].contiguous().view(torch.float16).float()


def nibbles(packed: Tensor) -> Tensor:
    """The low halves of the bytes of the last dimension, then their high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)
