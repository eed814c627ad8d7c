"""Planes: the byte tensors a packed weight is made of, and the scratch they are decoded into.

Scales are held as bytes (``uint8``) like the codes, so that ``module.to(torch.bfloat16)``, mixed precision and
FSDP's casts cannot touch them: what was read from the file is what is served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class PlaneSpec:
    """Shape and dtype of one plane.

    Attributes:
        shape: Dimension 0 counts output rows (or, for per-tensor data, groups of them), so that every plane can
            be sharded by its first dimension.
        dtype: Always an integer type, so that nothing casts it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    @property
    def num_bytes(self) -> int:
        """Bytes the plane takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def count_bits_per_weight(specs: Mapping[str, PlaneSpec], out_features: int, in_features: int) -> float:
    """Bits one weight takes, scales and padding included."""
    return 8 * sum(spec.num_bytes for spec in specs.values()) / (out_features * in_features)


def as_bytes(values: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: the last dimension grows by the item size; no copy."""
    return values.contiguous().view(torch.uint8)


def as_float16(plane: Tensor) -> Tensor:
    """The float16 values whose bytes a plane holds: the last dimension shrinks by 2; no copy."""
    return plane.contiguous().view(torch.float16)


def as_float32(plane: Tensor) -> Tensor:
    """The float32 values whose bytes a plane holds: the last dimension shrinks by 4; no copy."""
    return plane.contiguous().view(torch.float32)


def align(plane: Tensor) -> Tensor:
    """The plane, or a copy if its first byte lies where no float32 may: a mapped file starts a tensor anywhere."""
    if plane.device.type == "cpu" and not isinstance(plane, FakeTensor) and plane.data_ptr() % 16:
        return plane.clone(memory_format=torch.contiguous_format)
    return plane.contiguous()


class Scratch:
    """One buffer that decoded weights are written into, layer after layer, and the tables that decoding needs.

    A fresh tensor for every decode would cost page faults on the CPU and fragments on a GPU.  What ``take`` returns
    is valid until the next ``take``: consume it in a product before anything else is decoded.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of this shape inside the buffer; its content is undefined.

        Under ``torch.compile`` it is a fresh tensor, whose memory the compiler plans.
        """
        if torch.compiler.is_compiling() or device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(device)
        if buffer is None or buffer.numel() < num_bytes:
            self._buffers.pop(device, None)  # freed before the larger one is made
            buffer = self._buffers[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return buffer[:num_bytes].view(dtype).view(shape)

    def table(self, make: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
        """What ``make(device)`` returns, made once for each device."""
        if torch.compiler.is_compiling() or device.type == "meta":
            return make(device)
        key = (make.__name__, device)
        if key not in self._tables:
            self._tables[key] = make(device)
        return self._tables[key]

    def num_bytes(self) -> int:
        """Bytes now held, on all devices."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def __deepcopy__(self, memo: dict[int, object]) -> Scratch:
        return Scratch()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()
