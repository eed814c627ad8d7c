"""Unpacking GGUF's blocks inside numba kernels: from code that is written for one block to a function for loops.

A block never crosses a row and rows lie one after the other, so a weight is one sequence of blocks.  Every
``write_...`` of the modules that import this writes the code for one block in vector registers, in the order of
products that ggml and the ``gguf`` package have, rounded once where ``out`` holds bfloat16; the layouts are described
in ``ingle.quant``, whose plain torch is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from ingle.kernels.numba.vector import Array, Vector


def make_unpack(write: Callable[[Array, Array], None]) -> Any:
    """A function for kernels, ``unpack(data, at, out, to)``, from one that writes the code for a block."""

    @intrinsic  # type: ignore[untyped-decorator]
    def unpack(_: Any, data: Any, at: Any, out: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            source = Array(context, builder, kinds[0], arguments[0], arguments[1])
            write(source, Array(context, builder, kinds[2], arguments[2], arguments[3]))
            return context.get_dummy_value()

        return types.void(data, at, out, to), generate

    return unpack


def make_grid_unpack(write: Callable[[Array, Array, Array], None]) -> Any:
    """A function for kernels, ``unpack(data, at, grid, out, to)``, for formats whose codes name rows of a grid."""

    @intrinsic  # type: ignore[untyped-decorator]
    def unpack(_: Any, data: Any, at: Any, grid: Any, out: Any, to: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kinds = signature.args
            source = Array(context, builder, kinds[0], arguments[0], arguments[1])
            rows = Array(context, builder, kinds[2], arguments[2])
            write(source, rows, Array(context, builder, kinds[3], arguments[3], arguments[4]))
            return context.get_dummy_value()

        return types.void(data, at, grid, out, to), generate

    return unpack


def nibbles(packed: Vector) -> Vector:
    """The low halves of all bytes, then the high ones."""
    return (packed & 15).join(packed >> 4)
