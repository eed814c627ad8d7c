"""Defines planes, the byte tensors that a quantized weight consists of, and the scratch buffer for decoded weights.

Scales are stored as bytes (``uint8``), like codes, so that ``module.to(torch.bfloat16)``, mixed precision and FSDP
never cast them: the bytes that were read from a file are the bytes that are served.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class PlaneSpec:
    """Shape and dtype of one plane.

    Attributes:
        shape: Dimension 0 counts output rows, or groups of rows for nested scales (see ``Format.row_group``), so that
            every plane can be sharded along it.
        dtype: Always an integer type, so that nothing casts it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8

    @property
    def num_bytes(self) -> int:
        """Size of the plane in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def as_bytes(values: Tensor) -> Tensor:
    """Views a tensor as bytes; the last dimension grows by the item size."""
    return values.contiguous().view(torch.uint8)


def as_float16(plane: Tensor) -> Tensor:
    """Views a plane as float16; the last dimension shrinks by 2."""
    return plane.contiguous().view(torch.float16)


def as_float32(plane: Tensor) -> Tensor:
    """Views a plane as float32; the last dimension shrinks by 4."""
    return plane.contiguous().view(torch.float32)


def align(plane: Tensor) -> Tensor:
    """Returns a contiguous plane at an aligned address; copies it only if needed.

    Tensors of a memory-mapped file can start at any byte, and a view as float32 requires alignment.
    """
    if plane.device.type == "cpu" and not isinstance(plane, FakeTensor) and plane.data_ptr() % 16:
        return plane.clone(memory_format=torch.contiguous_format)
    return plane.contiguous()


class _Buffers(threading.local):
    """The buffers of one thread by device."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, Tensor] = {}


class Scratch:
    """A reusable buffer for decoded weights, one per thread and device, and a cache of lookup tables.

    Allocating for every decode costs page faults on the CPU and fragments GPU memory. The tensor from :meth:`take` is
    valid until the same thread calls :meth:`take` again, so use it before another layer decodes.
    """

    def __init__(self) -> None:
        self._buffers = _Buffers()
        self._tables: dict[tuple[type, str, torch.device], Tensor] = {}

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a tensor inside this thread's buffer; its content is undefined.

        Under ``torch.compile`` it is a new tensor, whose memory the compiler plans.
        """
        if torch.compiler.is_compiling() or device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        num_bytes = math.prod(shape) * dtype.itemsize
        buffers = self._buffers.by_device
        buffer = buffers.get(device)
        if buffer is None or buffer.numel() < num_bytes:
            buffers.pop(device, None)  # free the old buffer before allocating the larger one
            buffer = buffers[device] = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return buffer[:num_bytes].view(dtype).view(shape)

    def table(self, make: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
        """Returns ``make(device)``, computed once per device; the result must not be modified.

        A method computes a table for each class, because formats of several classes share one scratch.
        """
        if torch.compiler.is_compiling() or device.type == "meta":
            return make(device)
        key = (type(getattr(make, "__self__", None)), make.__name__, device)
        if key not in self._tables:
            self._tables[key] = make(device)
        return self._tables[key]

    def num_bytes(self) -> int:
        """Returns the size of this thread's buffers on all devices."""
        return sum(buffer.numel() for buffer in self._buffers.by_device.values())

    def __deepcopy__(self, memo: dict[int, object]) -> Scratch:
        return Scratch()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()
