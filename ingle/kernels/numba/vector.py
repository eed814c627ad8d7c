"""Vectors inside numba kernels: arithmetic on them emits LLVM code, so a kernel reads like the formula it computes.

LLVM vectorizes neither bit fields that are spread over a block nor searches whose sums must keep their order. Written
with these vectors, the former process a full block at once and the latter sixteen blocks side by side. The code does
not depend on the processor, because LLVM splits vectors into those that it supports. Nothing is reordered or fused, so
results are equal everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BYTE, WORD, DWORD, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
#: Adding and subtracting this rounds a float32 below 2^22 to an integer, ties to even.
ROUNDER = 12582912.0


def _operator(name: str, float_name: str = "") -> Callable[[Vector, Any], Vector]:
    """Returns a method of :class:`Vector` by the names of the builder's instructions for integers and for floats."""

    def method(self: Vector, other: Any) -> Vector:
        emit = getattr(self.builder, float_name if self.is_float and float_name else name)
        return Vector(self.builder, emit(self.value, self.of(other).value))

    return method


def _comparison(sign: str) -> Callable[[Vector, Any], Vector]:
    def method(self: Vector, other: Any) -> Vector:
        compare = self.builder.fcmp_ordered if self.is_float else self.builder.icmp_unsigned
        return Vector(self.builder, compare(sign, self.value, self.of(other).value))

    return method


class Vector:
    """A vector of floats or integers; a number as the other operand means a vector of that number.

    Args:
        builder: The llvmlite builder that emits the code.
        value: The IR value.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    @property
    def kind(self) -> Any:
        """The type of the elements."""
        return self.value.type.element

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(self.value.type.count)

    @property
    def is_float(self) -> bool:
        """Whether the elements are floats."""
        return isinstance(self.kind, ir.FloatType)

    __add__ = _operator("add", "fadd")
    __sub__ = _operator("sub", "fsub")
    __mul__ = _operator("mul", "fmul")
    __truediv__ = _operator("", "fdiv")
    __and__ = _operator("and_")
    __or__ = _operator("or_")
    __xor__ = _operator("xor")
    __lshift__ = _operator("shl")
    __rshift__ = _operator("lshr")
    __lt__ = _comparison("<")
    __gt__ = _comparison(">")
    __ge__ = _comparison(">=")

    def __rtruediv__(self, other: Any) -> Vector:
        return self.of(other) / self

    def same(self, other: Any) -> Vector:
        """Returns which elements are equal; ``==`` of two vectors."""
        return _comparison("==")(self, other)

    def take(self, order: Sequence[int], other: Vector | None = None) -> Vector:
        """Returns the elements with these indices; indices past the end select from ``other``, or zero without it."""
        rest = ir.Constant(self.value.type, None) if other is None else other.value
        return Vector(self.builder, self.builder.shuffle_vector(self.value, rest, _constant(DWORD, order)))

    def __getitem__(self, part: slice) -> Vector:
        return self.take(range(self.count)[part])

    def join(self, other: Vector) -> Vector:
        """Returns the elements of both, one vector after the other."""
        return self.take(range(self.count + other.count), other)

    def weave(self, other: Vector) -> Vector:
        """Returns the elements of both, alternating."""
        return self.take([index for k in range(self.count) for index in (k, self.count + k)], other)

    def spread(self, index: int, count: int) -> Vector:
        """Returns one element repeated ``count`` times."""
        return self.take([index] * count)

    def choose(self, yes: Any, no: Vector) -> Vector:
        """Returns ``yes`` where this condition holds, ``no`` elsewhere."""
        return Vector(self.builder, self.builder.select(self.value, no.of(yes).value, no.value))

    def at_least(self, bound: Any) -> Vector:
        """Returns the maximum with a bound; the bound for a NaN."""
        above: Vector = self > bound
        return above.choose(self, self.of(bound))

    def at_most(self, bound: Any) -> Vector:
        """Returns the minimum with a bound; the bound for a NaN."""
        below: Vector = self < bound
        return below.choose(self, self.of(bound))

    def size(self) -> Vector:
        """Returns absolute values of floats."""
        return (self.bits() & 0x7FFFFFFF).from_bits()

    def round(self) -> Vector:
        """Returns floats below 2^22 rounded to integers, ties to even."""
        return self + ROUNDER - ROUNDER

    def root(self) -> Vector:
        """Returns square roots."""
        return self.call(f"llvm.sqrt.v{self.count}f32")

    def view(self, kind: Any) -> Vector:
        """Returns the same bits as elements of another type."""
        count = self.count * _width(self.kind) // _width(kind)
        return Vector(self.builder, self.builder.bitcast(self.value, ir.VectorType(kind, count)))

    def bits(self) -> Vector:
        """Returns the bits of floats."""
        return self.view(DWORD)

    def from_bits(self) -> Vector:
        """Returns the floats with these bits."""
        return self.view(FLOAT)

    def call(self, name: str, *others: Vector) -> Vector:
        """Returns the result of an LLVM intrinsic, whose operands and result have one type."""
        vectors = (self, *others)
        kind = ir.FunctionType(self.value.type, [vector.value.type for vector in vectors])
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return Vector(self.builder, self.builder.call(function, [vector.value for vector in vectors]))

    def widen(self, kind: Any, *, signed: bool = False) -> Vector:
        """Returns the same integers in a wider type."""
        extend = self.builder.sext if signed else self.builder.zext
        return Vector(self.builder, extend(self.value, ir.VectorType(kind, self.count)))

    def narrow(self, kind: Any) -> Vector:
        """Returns the low bits of integers."""
        return Vector(self.builder, self.builder.trunc(self.value, ir.VectorType(kind, self.count)))

    def to_float(self, *, signed: bool = False) -> Vector:
        """Returns integers as floats."""
        wide = self if self.kind == DWORD else self.widen(DWORD, signed=signed)
        return Vector(self.builder, self.builder.sitofp(wide.value, ir.VectorType(FLOAT, self.count)))

    def to_int(self) -> Vector:
        """Returns floats rounded toward zero, as 32-bit integers."""
        return Vector(self.builder, self.builder.fptosi(self.value, ir.VectorType(DWORD, self.count)))

    def truncate(self) -> Vector:
        """Returns floats below 2^31 rounded toward zero."""
        return self.to_int().to_float()

    def round_half_away(self) -> Vector:
        """Returns floats below 2^31 rounded to integers, ties away from zero, like C's ``roundf``."""
        integer = self.truncate()
        away = ((self - integer).size() >= 0.5).choose(1.0, self.of(0.0))
        return (self < 0.0).choose(integer - away, integer + away)

    def to_bfloat16(self) -> Vector:
        """Returns the bfloat16 bits of float32 elements, rounded to nearest, ties to even."""
        bits = self.bits()
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).narrow(WORD)

    def of(self, other: Any) -> Vector:
        """Converts a vector, a list of numbers, or one number or IR value for all elements to a vector of this type."""
        if isinstance(other, Vector):
            return other
        if isinstance(other, list):
            return Vector(self.builder, _constant(self.kind, other))
        if isinstance(other, ir.Value):
            return splat(self.builder, other, self.count)
        return Vector(self.builder, _constant(self.kind, [other] * self.count))


class Array:
    """A contiguous numpy array as emitted code sees it.

    Args:
        builder: The llvmlite builder that emits the code.
        dtype: numba type of the elements.
        start: IR pointer to the element with index 0.
    """

    def __init__(self, builder: Any, dtype: Any, start: Any) -> None:
        self.builder = builder
        self.dtype = dtype
        self.start = start

    def offset(self, index: Any) -> Array:
        """Returns the array from an index on."""
        return Array(self.builder, self.dtype, self.builder.gep(self.start, [index]))

    def load(self, first: Any, count: int, kind: Any = None) -> Vector:
        """Returns ``count`` elements from ``first`` on, or that many of another type at the same address."""
        return Vector(self.builder, self._access(first, count, kind, None))

    def store(self, first: Any, vector: Vector) -> None:
        """Stores elements from ``first`` on; floats as bfloat16 if the array has type uint16."""
        if vector.is_float and self.dtype == types.uint16:
            vector = vector.to_bfloat16()
        elif vector.is_float and self.dtype == types.uint32:
            vector = vector.bits()
        self._access(first, vector.count, vector.kind, vector.value)

    def scalar(self, first: Any, kind: Any) -> Any:
        """Returns one value of any type at the address of an element."""
        loaded = self.builder.load(self._pointer(first, kind))
        loaded.align = 1
        return loaded

    def flags(self, first: int, count: int) -> Vector:
        """Returns single bits from byte ``first`` on, lowest first, as a condition."""
        bits = self.scalar(first, ir.IntType(count))
        return Vector(self.builder, self.builder.bitcast(bits, ir.VectorType(ir.IntType(1), count)))

    def half(self, first: int) -> Any:
        """Returns the float32 of the float16 at byte ``first``."""
        return self.half_of(self.scalar(first, WORD))

    def half_of(self, word: Any) -> Any:
        """Returns the float32 of float16 bits, without instructions that not all processors have."""
        builder = self.builder
        bits = builder.zext(word, DWORD)
        magnitude = builder.and_(bits, DWORD(0x7FFF))
        tiny = builder.fmul(builder.uitofp(magnitude, FLOAT), FLOAT(2.0**-24))
        normal = builder.add(builder.shl(magnitude, DWORD(13)), DWORD(112 << 23))
        special = builder.or_(normal, DWORD(0x7F800000))
        value = builder.select(builder.icmp_unsigned(">=", magnitude, DWORD(0x7C00)), special, normal)
        is_tiny = builder.icmp_unsigned("<", magnitude, DWORD(0x400))
        value = builder.select(is_tiny, builder.bitcast(tiny, DWORD), value)
        sign = builder.shl(builder.and_(bits, DWORD(0x8000)), DWORD(16))
        return builder.bitcast(builder.or_(value, sign), FLOAT)

    def _pointer(self, first: Any, kind: Any) -> Any:
        index = ir.IntType(64)(first) if isinstance(first, int) else first
        return self.builder.bitcast(self.builder.gep(self.start, [index]), kind.as_pointer())

    def _access(self, first: Any, count: int, kind: Any, value: Any) -> Any:
        if kind is None:
            kind = FLOAT if self.dtype == types.float32 else ir.IntType(self.dtype.bitwidth)
        pointer = self._pointer(first, ir.VectorType(kind, count))
        access = self.builder.load(pointer) if value is None else self.builder.store(value, pointer)
        access.align = 1
        return access


class Variable:
    """A vector that a loop can assign to."""

    def __init__(self, initial: Vector) -> None:
        self.builder = initial.builder
        self.place = cgutils.alloca_once_value(self.builder, initial.value)

    def get(self) -> Vector:
        """Returns the current value."""
        return Vector(self.builder, self.builder.load(self.place))

    def set(self, vector: Vector) -> None:
        """Assigns a value."""
        self.builder.store(vector.value, self.place)


def splat(builder: Any, value: Any, count: int) -> Vector:
    """Returns a vector with an IR scalar in every element."""
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    vector = builder.insert_element(empty, value, DWORD(0))
    return Vector(builder, builder.shuffle_vector(vector, vector, _constant(DWORD, [0] * count)))


def fill(builder: Any, value: float, count: int) -> Vector:
    """Returns a vector with a float32 constant in every element."""
    return Vector(builder, _constant(FLOAT, [value] * count))


def repeat(builder: Any, count: Any, body: Callable[[Any], None]) -> None:
    """Emits a loop: calls ``body`` once, with the index as an IR value. ``count`` is a number or an IR value."""
    with cgutils.for_range(builder, ir.IntType(64)(count) if isinstance(count, int) else count) as loop:
        body(loop.index)


def _width(kind: Any) -> int:
    return 32 if isinstance(kind, ir.FloatType) else int(kind.width)


def _constant(kind: Any, values: Sequence[Any] | range) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), list(values))


#: Kinds of parameters of :func:`make_intrinsic`, besides numba's scalar types.
ARRAY, OFFSET = "array", "offset"


def make_intrinsic(emit: Callable[..., None], kinds: Sequence[Any], **options: Any) -> Any:
    """Returns a function that kernels can call, from one that emits its code.

    Args:
        emit: Called once for each combination of argument types, with an :class:`Array` for each array and an IR value
            for each scalar.
        kinds: The parameters: ``ARRAY``; ``OFFSET``, an index at which the array before it begins; or a scalar type.
        **options: Further arguments of ``emit``.
    """

    def define(_: Any, *given: Any) -> tuple[Any, Any]:
        declared = [kind if kind not in (ARRAY, OFFSET) else type_ for kind, type_ in zip(kinds, given, strict=True)]

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            arguments: list[Any] = []
            for kind, type_, value in zip(kinds, signature.args, values, strict=True):
                if kind == ARRAY:
                    arguments.append(
                        Array(builder, type_.dtype, context.make_array(type_)(context, builder, value).data)
                    )
                elif kind == OFFSET:
                    arguments[-1] = arguments[-1].offset(value)
                else:
                    arguments.append(value)
            emit(*arguments, **options)
            return context.get_dummy_value()

        return types.void(*declared), generate

    # Numba reads the parameters from the signature, and does not take a variable number.
    parameter = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ("context", *(f"argument_{number}" for number in range(len(kinds))))
    define.__signature__ = inspect.Signature([inspect.Parameter(name, parameter) for name in names])  # type: ignore[attr-defined]
    return intrinsic(define)
