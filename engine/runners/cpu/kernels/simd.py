"""Vectors of eight float32 numbers, for the compiled kernels.

numba compiles scalar Python and leaves vectors to LLVM's optimiser, whose result changes with every edit. Here vectors
are explicit: `f32x8` is a value in a register (two registers where they have 128 bits, as in NEON), and each function
below is one or a few instructions. So the order of every sum is fixed, and a row of a batch has the same bits as the
row alone.

Memory is given by its address (an integer) and the type of its numbers (`kind`): np.float32, np.float16, np.uint16 for
the bits of bfloat16, or np.int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 8

F32, I32 = ir.FloatType(), ir.IntType(32)
VECTOR, INTEGERS = ir.VectorType(F32, WIDTH), ir.VectorType(I32, WIDTH)


class _Float32x8(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="f32x8")


f32x8 = _Float32x8()


@register_model(_Float32x8)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [float(np.float32(value))] * WIDTH)


def _integer(value: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [value] * WIDTH)


def call_llvm(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an intrinsic of LLVM, such as fma, on vectors."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v8f32"), args)


def _pointer(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def widened(builder: ir.IRBuilder, dtype: Any, address: ir.Value, index: ir.Value) -> ir.Value:
    """Eight numbers of a numba type from element `index` on, as float32."""
    if dtype == types.float32:
        return builder.load(builder.bitcast(_pointer(builder, address, index, F32), VECTOR.as_pointer()), align=4)
    bits = ir.IntType(dtype.bitwidth)
    packed = ir.VectorType(bits, WIDTH)
    source = builder.bitcast(_pointer(builder, address, index, bits), packed.as_pointer())
    loaded = builder.load(source, align=bits.width // 8)
    if dtype == types.float16:
        return builder.fpext(builder.bitcast(loaded, ir.VectorType(ir.HalfType(), WIDTH)), VECTOR)
    if dtype == types.uint16:  # bfloat16 is the upper half of float32
        return builder.bitcast(builder.shl(builder.zext(loaded, INTEGERS), _integer(16)), VECTOR)
    return builder.sitofp(builder.sext(loaded, INTEGERS), VECTOR)


def two_vectors(builder: ir.IRBuilder, dtype: Any, address: ir.Value, index: ir.Value) -> list[ir.Value]:
    """Sixteen numbers from element `index` on, as float32: eight and eight.

    Of bfloat16 numbers, those at even places and those at odd places, which takes half the instructions.
    """
    if dtype != types.uint16:
        return [widened(builder, dtype, address, builder.add(index, index.type(n))) for n in (0, WIDTH)]
    source = builder.bitcast(_pointer(builder, address, index, ir.IntType(16)), INTEGERS.as_pointer())
    pairs = builder.load(source, align=2)
    halves = builder.shl(pairs, _integer(16)), builder.and_(pairs, _integer(0xFFFF0000))
    return [builder.bitcast(half, VECTOR) for half in halves]


@intrinsic
def load(_context: Any, kind: Any, address: Any, index: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Read eight numbers of `kind` from element `index` on, and widen them to float32."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return widened(builder, kind.dtype, args[1], args[2])

    return f32x8(kind, types.int64, types.int64), generate


@intrinsic
def load_two(_context: Any, kind: Any, address: Any, index: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Read sixteen numbers of `kind` as two vectors, in the order of `two_vectors`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return context.make_tuple(builder, signature.return_type, two_vectors(builder, kind.dtype, args[1], args[2]))

    return types.UniTuple(f32x8, 2)(kind, types.int64, types.int64), generate


@intrinsic
def in_order(_context: Any, kind: Any, x: Any, y: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Sixteen numbers in the order of `load_two`, in their own order."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        halves = list(args[1:])
        if kind.dtype == types.uint16:
            places = ([n // 2 + WIDTH * (n % 2) for n in range(first, first + WIDTH)] for first in (0, WIDTH))
            halves = [builder.shuffle_vector(*args[1:], ir.Constant(INTEGERS, each)) for each in places]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(f32x8, 2)(kind, x, y), generate


@intrinsic
def size_of(_context: Any, kind: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The bytes of a number of `kind`."""
    size = ir.Constant(ir.IntType(64), kind.dtype.bitwidth // 8)
    return types.int64(kind), lambda _context, _builder, _signature, _args: size


@intrinsic
def store(_context: Any, address: Any, index: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Write eight float32 numbers from element `index` on."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        target = _pointer(builder, args[0], args[1], F32)
        builder.store(args[2], builder.bitcast(target, VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, x), generate


@intrinsic
def store_bfloat16(_context: Any, address: Any, index: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Write eight numbers rounded to bfloat16, ties to even, from element `index` on."""
    packed = ir.VectorType(ir.IntType(16), WIDTH)

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        bits = builder.bitcast(args[2], INTEGERS)
        odd = builder.and_(builder.lshr(bits, _integer(16)), _integer(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _integer(0x7FFF)), odd), _integer(16))
        target = _pointer(builder, args[0], args[1], ir.IntType(16))
        builder.store(builder.trunc(rounded, packed), builder.bitcast(target, packed.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, x), generate


@intrinsic
def store_int8(_context: Any, address: Any, index: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Write eight numbers between -127 and 127 rounded to int8, ties to even, from element `index` on."""
    packed = ir.VectorType(ir.IntType(8), WIDTH)

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        whole = builder.fptosi(call_llvm(builder, "nearbyint", args[2]), INTEGERS)
        target = _pointer(builder, args[0], args[1], ir.IntType(8))
        builder.store(builder.trunc(whole, packed), builder.bitcast(target, packed.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, x), generate


@intrinsic
def splat(_context: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """A vector of eight times the float32 `x`."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        undefined = ir.Constant(VECTOR, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(I32, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(INTEGERS, [0] * WIDTH))

    return f32x8(types.float32), generate


@intrinsic
def fma(_context: Any, x: Any, y: Any, z: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """x * y + z, rounded once."""
    return f32x8(x, y, z), lambda _context, builder, _signature, args: call_llvm(builder, "fma", *args)


@intrinsic
def add(_context: Any, x: Any, y: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """x + y."""
    return f32x8(x, y), lambda _context, builder, _signature, args: builder.fadd(*args)


@intrinsic
def sub(_context: Any, x: Any, y: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """x - y."""
    return f32x8(x, y), lambda _context, builder, _signature, args: builder.fsub(*args)


@intrinsic
def mul(_context: Any, x: Any, y: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """x * y."""
    return f32x8(x, y), lambda _context, builder, _signature, args: builder.fmul(*args)


@intrinsic
def div(_context: Any, x: Any, y: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """x / y."""
    return f32x8(x, y), lambda _context, builder, _signature, args: builder.fdiv(*args)


@intrinsic
def maximum(_context: Any, x: Any, y: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The larger of each pair."""
    return f32x8(x, y), lambda _context, builder, _signature, args: call_llvm(builder, "maxnum", *args)


def reduced(
    builder: ir.IRBuilder, x: ir.Value, combine: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Reduce eight numbers to one: combine the lower half with the upper one until one number is left."""
    for half in (4, 2, 1):
        places = [ir.Constant(ir.VectorType(I32, half), list(range(k, k + half))) for k in (0, half)]
        x = combine(builder, *(builder.shuffle_vector(x, x, place) for place in places))
    return builder.extract_element(x, ir.Constant(I32, 0))


@intrinsic
def total(_context: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The sum of the eight numbers, always in the same order."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return reduced(builder, args[0], lambda b, low, high: b.fadd(low, high))

    return types.float32(x), generate


@intrinsic
def largest(_context: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The largest of the eight numbers."""

    def greater(builder: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", low, high), low, high)

    return types.float32(x), lambda _context, builder, _signature, args: reduced(builder, args[0], greater)


@intrinsic
def totals(
    _context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """One vector with the sums of eight vectors."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]  # within the halves of a 256-bit register

    def pairs(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        return builder.fadd(*(builder.shuffle_vector(x, y, ir.Constant(INTEGERS, places)) for places in (even, odd)))

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        twos = [pairs(builder, args[n], args[n + 1]) for n in range(0, WIDTH, 2)]
        low, high = pairs(builder, twos[0], twos[1]), pairs(builder, twos[2], twos[3])
        halves = ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
        return builder.fadd(*(builder.shuffle_vector(low, high, ir.Constant(INTEGERS, places)) for places in halves))

    return f32x8(*[f32x8] * WIDTH), generate


# e^x = 2^k e^r with k a whole number and |r| <= log(2) / 2. There, the series to r^7 has an error of 6e-9.
_LOG2_E = 1 / math.log(2)
_LOWEST = -87.0  # e^-87 is about the smallest normal float32


@intrinsic
def exp(_context: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """e^x with a relative error below 2e-7. Below -87, x counts as -87; above 88, as 88."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        bounded = call_llvm(
            builder, "minnum", call_llvm(builder, "maxnum", args[0], _constant(_LOWEST)), _constant(88.0)
        )
        whole = call_llvm(builder, "nearbyint", builder.fmul(bounded, _constant(_LOG2_E)))
        # log 2 in two parts, the first with few bits, so that x - k log 2 has no cancellation
        high = float(np.float32(0.693359375))
        rest = call_llvm(builder, "fma", whole, _constant(-high), bounded)
        rest = call_llvm(builder, "fma", whole, _constant(high - math.log(2)), rest)
        value = _constant(1 / math.factorial(7))
        for n in range(6, -1, -1):
            value = call_llvm(builder, "fma", value, rest, _constant(1 / math.factorial(n)))
        exponent = builder.shl(builder.add(builder.fptosi(whole, INTEGERS), _integer(127)), _integer(23))
        return builder.fmul(value, builder.bitcast(exponent, VECTOR))

    return f32x8(x), generate


@intrinsic
def get(_context: Any, address: Any, index: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Read the float32 number at element `index`."""

    def generate(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.load(_pointer(builder, args[0], args[1], F32), align=4)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def put(_context: Any, address: Any, index: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Write one float32 number to element `index`."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        builder.store(args[2], _pointer(builder, args[0], args[1], F32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def store_halves(
    _context: Any, low: Any, low_index: Any, high: Any, high_index: Any, x: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Write the first four of eight float32 numbers to one place and the last four to another."""
    four = ir.VectorType(F32, 4)

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        x = args[4]
        for address, index, first in ((args[0], args[1], 0), (args[2], args[3], 4)):
            places = ir.Constant(ir.VectorType(I32, 4), list(range(first, first + 4)))
            target = builder.bitcast(_pointer(builder, address, index, F32), four.as_pointer())
            builder.store(builder.shuffle_vector(x, x, places), target, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, x), generate


@intrinsic
def split(_context: Any, x: Any, y: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The numbers at even places of sixteen, x then y, and those at odd places."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        halves = [
            builder.shuffle_vector(*args, ir.Constant(INTEGERS, list(range(first, 2 * WIDTH, 2)))) for first in (0, 1)
        ]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(f32x8, 2)(x, y), generate


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Fetch the cache line of an address, without waiting for it."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, byte), *(ir.Constant(I32, n) for n in (0, 3, 1))])


@intrinsic
def fetch(_context: Any, kind: Any, address: Any, index: Any, count: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Prefetch `count` numbers of `kind` from element `index` on, without waiting for them."""
    size = kind.dtype.bitwidth // 8

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        scale = ir.Constant(ir.IntType(64), size)
        start = builder.add(args[1], builder.mul(args[2], scale))
        stop = builder.mul(args[3], scale)
        with cgutils.for_range_slice(builder, stop.type(0), stop, stop.type(64)) as (offset, _):
            prefetch(builder, builder.add(start, offset))
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.int64), generate
