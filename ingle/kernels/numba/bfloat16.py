"""Scalar building blocks of the numba kernels: bfloat16 as bit patterns, and an exponential that vectorises.

numba knows no bfloat16, so kernels see such tensors as uint16 and widen, compute in float32 and round by hand.
Everything here is inlined into the kernels that use it; LLVM turns the loops around it into vector code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

#: Float rules of the kernels: sums may be reordered and multiply-adds fused; NaN and infinity keep their meaning.
FAST = {"contract", "nsz", "arcp", "reassoc"}


_BIT16 = ir.IntType(16)
_BIT32 = ir.IntType(32)


@intrinsic
def widen(typing_context, bits):  # type: ignore[no-untyped-def]
    """bfloat16 bits -> float32, exact."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        high = builder.shl(builder.zext(arguments[0], _BIT32), _BIT32(16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def narrow(typing_context, value):  # type: ignore[no-untyped-def]
    """float32 -> bfloat16 bits, to nearest, ties to even; a NaN stays one."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = builder.bitcast(arguments[0], _BIT32)
        odd = builder.and_(builder.lshr(bits, _BIT32(16)), _BIT32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _BIT32(0x7FFF)), odd), _BIT32(16))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, _BIT32(0x7FC0), rounded), _BIT16)

    return types.uint16(types.float32), build


@intrinsic
def power_of_two(typing_context, exponent):  # type: ignore[no-untyped-def]
    """A whole float32 n in [-126, 127] -> 2^n; anything for a NaN."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        whole = builder.fptosi(arguments[0], _BIT32)
        return builder.bitcast(builder.shl(builder.add(whole, _BIT32(127)), _BIT32(23)), ir.FloatType())

    return types.float32(types.float32), build


def _flip_negative(builder: Any, bits: Any) -> Any:
    """Turns float order into integer order of the bits and back: what follows the sign is inverted if it is set."""
    return builder.xor(bits, builder.and_(builder.ashr(bits, _BIT32(31)), _BIT32(0x7FFFFFFF)))


@intrinsic
def to_order(typing_context, value):  # type: ignore[no-untyped-def]
    """float32 -> an int32 that compares as the float does; a positive NaN is above everything."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return _flip_negative(builder, builder.bitcast(arguments[0], _BIT32))

    return types.int32(types.float32), build


@intrinsic
def from_order(typing_context, order):  # type: ignore[no-untyped-def]
    """What :func:`to_order` was given."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(_flip_negative(builder, arguments[0]), ir.FloatType())

    return types.float32(types.int32), build


@njit(fastmath=FAST)
def exp(x):  # type: ignore[no-untyped-def]
    """e^x in float32, within 2 ulp on [-87, 88], clamped outside it; a NaN stays one.

    Source: Cephes ``expf`` (Moshier): e^x = 2^n e^r with |r| <= ln(2) / 2 and a polynomial of degree 7 for e^r.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * power_of_two(n)


def load(values: Any, index: Any) -> Any:
    """One element of a float32 or bfloat16 array as float32 (inside numba only)."""
    raise NotImplementedError


def store(values: Any, index: Any, value: Any) -> None:
    """Writes a float32 into a float32 or bfloat16 array (inside numba only)."""
    raise NotImplementedError


@overload(load)
def _load(values, index):  # type: ignore[no-untyped-def]
    if values.dtype == types.uint16:
        return lambda values, index: widen(values[index])
    return lambda values, index: values[index]


@overload(store)
def _store(values, index, value):  # type: ignore[no-untyped-def]
    def store_bfloat16(values, index, value):  # type: ignore[no-untyped-def]
        values[index] = narrow(value)

    def store_float32(values, index, value):  # type: ignore[no-untyped-def]
        values[index] = value

    return store_bfloat16 if values.dtype == types.uint16 else store_float32


@njit(fastmath=FAST)
def largest(values):  # type: ignore[no-untyped-def]
    """The largest of an array; compared as integers, since compilers do not vectorise the maximum of floats."""
    top = np.int32(-(2**31))
    for j in range(len(values)):
        top = max(top, to_order(load(values, j)))
    return from_order(top)


def supported(*tensors: torch.Tensor) -> bool:
    """Whether the numba kernels take these: on the CPU, float32 or bfloat16, one type."""
    dtypes = {tensor.dtype for tensor in tensors}
    return (
        len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16}
        and all(tensor.device.type == "cpu" for tensor in tensors)
    )


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A numpy view of a CPU tensor's memory: uint16 for bfloat16, the tensor's own type otherwise."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


__all__ = ["FAST", "bits", "exp", "largest", "load", "narrow", "njit", "prange", "store", "supported", "widen"]
