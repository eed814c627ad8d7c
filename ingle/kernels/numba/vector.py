"""Vectors inside numba kernels: arithmetic on them writes LLVM code, so a kernel reads like the formula it computes.

LLVM vectorises neither bit fields that lie across a block nor searches whose sums must keep their order; written with
these vectors, the former take a whole block and the latter sixteen blocks side by side.  No processor is named: LLVM
splits vectors into what there is.  Nothing is reordered or fused, so results are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

BYTE, WORD, DWORD, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
#: Adding and taking away this rounds a float32 below 2^22 to a whole number, half to even.
MAGIC = 12582912.0


class Vector:
    """A vector of floats or integers; numbers beside it mean vectors of that number.

    Args:
        builder: llvmlite's, at the place where the code is to go.
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
        """How many elements."""
        return int(self.value.type.count)

    @property
    def is_float(self) -> bool:
        """Whether the elements are floats."""
        return isinstance(self.kind, ir.FloatType)

    def __add__(self, other: Any) -> Vector:
        return self._combine("fadd" if self.is_float else "add", other)

    def __sub__(self, other: Any) -> Vector:
        return self._combine("fsub" if self.is_float else "sub", other)

    def __mul__(self, other: Any) -> Vector:
        return self._combine("fmul" if self.is_float else "mul", other)

    def __truediv__(self, other: Any) -> Vector:
        return self._combine("fdiv", other)

    def __rtruediv__(self, other: Any) -> Vector:
        return self.of(other) / self

    def __and__(self, other: Any) -> Vector:
        return self._combine("and_", other)

    def __or__(self, other: Any) -> Vector:
        return self._combine("or_", other)

    def __xor__(self, other: Any) -> Vector:
        return self._combine("xor", other)

    def __lshift__(self, other: Any) -> Vector:
        return self._combine("shl", other)

    def __rshift__(self, other: Any) -> Vector:
        return self._combine("lshr", other)

    def __lt__(self, other: Any) -> Vector:
        return self._compare("<", other)

    def __gt__(self, other: Any) -> Vector:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Vector:
        return self._compare(">=", other)

    def same(self, other: Any) -> Vector:
        """Where both are equal."""
        return self._compare("==", other)

    def __getitem__(self, part: slice) -> Vector:
        order = range(self.count)[part]
        return Vector(self.builder, self.builder.shuffle_vector(self.value, self.value, _constant(DWORD, order)))

    def join(self, other: Vector) -> Vector:
        """The elements of both, one vector after the other."""
        order = range(self.count + other.count)
        return Vector(self.builder, self.builder.shuffle_vector(self.value, other.value, _constant(DWORD, order)))

    def weave(self, other: Vector) -> Vector:
        """The elements of both in turns."""
        order = _constant(DWORD, [index for k in range(self.count) for index in (k, self.count + k)])
        return Vector(self.builder, self.builder.shuffle_vector(self.value, other.value, order))

    def spread(self, index: int, count: int) -> Vector:
        """One element, ``count`` times."""
        order = _constant(DWORD, [index] * count)
        return Vector(self.builder, self.builder.shuffle_vector(self.value, self.value, order))

    def take(self, order: Sequence[int]) -> Vector:
        """The elements of these numbers; the number after the last means zero."""
        zero = Vector(self.builder, ir.Constant(self.value.type, None))
        shuffled = self.builder.shuffle_vector(self.value, zero.value, _constant(DWORD, order))
        return Vector(self.builder, shuffled)

    def choose(self, yes: Any, no: Vector) -> Vector:
        """Where this holds the one, elsewhere the other."""
        return Vector(self.builder, self.builder.select(self.value, no.of(yes).value, no.value))

    def at_least(self, bound: Any) -> Vector:
        """The larger of the two; the bound for a NaN."""
        return self._compare(">", bound).choose(self, self.of(bound))

    def at_most(self, bound: Any) -> Vector:
        """The smaller of the two; the bound for a NaN."""
        return self._compare("<", bound).choose(self, self.of(bound))

    def size(self) -> Vector:
        """Absolute values of floats."""
        return (self.bits() & 0x7FFFFFFF).from_bits()

    def round(self) -> Vector:
        """Floats below 2^22 to whole numbers, half to even."""
        return self + MAGIC - MAGIC

    def root(self) -> Vector:
        """Square roots."""
        kind = ir.FunctionType(self.value.type, [self.value.type])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.sqrt.v{self.count}f32")
        return Vector(self.builder, self.builder.call(function, [self.value]))

    def bits(self) -> Vector:
        """The bits of floats."""
        return Vector(self.builder, self.builder.bitcast(self.value, ir.VectorType(DWORD, self.count)))

    def from_bits(self) -> Vector:
        """The floats of these bits."""
        return Vector(self.builder, self.builder.bitcast(self.value, ir.VectorType(FLOAT, self.count)))

    def widen(self, kind: Any, *, signed: bool = False) -> Vector:
        """Larger integers of the same values."""
        extend = self.builder.sext if signed else self.builder.zext
        return Vector(self.builder, extend(self.value, ir.VectorType(kind, self.count)))

    def narrow(self, kind: Any) -> Vector:
        """The low bits of integers."""
        return Vector(self.builder, self.builder.trunc(self.value, ir.VectorType(kind, self.count)))

    def to_float(self, *, signed: bool = False) -> Vector:
        """Floats of integers."""
        wide = self if self.kind == DWORD else self.widen(DWORD, signed=signed)
        return Vector(self.builder, self.builder.sitofp(wide.value, ir.VectorType(FLOAT, self.count)))

    def to_int(self) -> Vector:
        """Floats without their fractions, as 32-bit integers."""
        return Vector(self.builder, self.builder.fptosi(self.value, ir.VectorType(DWORD, self.count)))

    def truncate(self) -> Vector:
        """Floats below 2^31 without their fractions."""
        return self.to_int().to_float()

    def to_bfloat16(self) -> Vector:
        """The upper halves of float32 bits, rounded to nearest even."""
        bits = self.bits()
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).narrow(WORD)

    def of(self, other: Any) -> Vector:
        """A vector of this kind: the same one, listed numbers, or a scalar IR value or a number in every element."""
        if isinstance(other, Vector):
            return other
        if isinstance(other, list):
            return Vector(self.builder, _constant(self.kind, other))
        if isinstance(other, ir.Value):
            return splat(self.builder, other, self.count)
        return Vector(self.builder, _constant(self.kind, [other] * self.count))

    def _combine(self, name: str, other: Any) -> Vector:
        return Vector(self.builder, getattr(self.builder, name)(self.value, self.of(other).value))

    def _compare(self, sign: str, other: Any) -> Vector:
        compare = self.builder.fcmp_ordered if self.is_float else self.builder.icmp_unsigned
        return Vector(self.builder, compare(sign, self.value, self.of(other).value))


class Array:
    """A contiguous numpy array as generated code sees it.

    Args:
        context: numba's.
        builder: llvmlite's.
        kind: The array's numba type.
        array: The array's IR value.
        at: Index of the element that counts as the first; the array's own first if None.
    """

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, at: Any = None) -> None:
        start = context.make_array(kind)(context, builder, array).data
        self.builder = builder
        self.dtype = kind.dtype
        self.start = start if at is None else builder.gep(start, [at])

    def load(self, first: Any, count: int, kind: Any = None) -> Vector:
        """Elements from ``first`` on, or the same memory as ``count`` of another kind."""
        return Vector(self.builder, self._access(first, count, kind, None))

    def store(self, first: Any, vector: Vector) -> None:
        """Writes elements from ``first`` on; floats as bfloat16 where the array is of uint16."""
        if vector.is_float and self.dtype == types.uint16:
            vector = vector.to_bfloat16()
        elif vector.is_float and self.dtype == types.uint32:
            vector = vector.bits()
        self._access(first, vector.count, vector.kind, vector.value)

    def scalar(self, first: Any, kind: Any) -> Any:
        """One value of any kind at an element."""
        loaded = self.builder.load(self._pointer(first, kind))
        loaded.align = 1
        return loaded

    def flags(self, first: int, count: int) -> Vector:
        """Single bits from a fixed byte on, the lowest first, as a condition."""
        bits = self.scalar(first, ir.IntType(count))
        return Vector(self.builder, self.builder.bitcast(bits, ir.VectorType(ir.IntType(1), count)))

    def half(self, first: int) -> Any:
        """The float32 of the float16 at a fixed byte."""
        return self.half_of(self.scalar(first, WORD))

    def half_of(self, word: Any) -> Any:
        """The float32 of a float16's bits; without the processor's help, which not all have."""
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
    """A vector that a loop changes."""

    def __init__(self, initial: Vector) -> None:
        self.builder = initial.builder
        self.place = cgutils.alloca_once_value(self.builder, initial.value)

    def get(self) -> Vector:
        """What it is now."""
        return Vector(self.builder, self.builder.load(self.place))

    def set(self, vector: Vector) -> None:
        """Takes another value."""
        self.builder.store(vector.value, self.place)


def splat(builder: Any, value: Any, count: int) -> Vector:
    """A scalar in every element."""
    empty = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    vector = builder.insert_element(empty, value, DWORD(0))
    return Vector(builder, builder.shuffle_vector(vector, vector, _constant(DWORD, [0] * count)))


def fill(builder: Any, value: float, count: int) -> Vector:
    """A float32 constant in every element."""
    return Vector(builder, _constant(FLOAT, [value] * count))


def repeat(builder: Any, count: Any, body: Callable[[Any], None]) -> None:
    """A loop: calls ``body`` once, with the index as an IR value; ``count`` is a number or such a value."""
    with cgutils.for_range(builder, ir.IntType(64)(count) if isinstance(count, int) else count) as loop:
        body(loop.index)


def _constant(kind: Any, values: Sequence[Any] | range) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), list(values))
