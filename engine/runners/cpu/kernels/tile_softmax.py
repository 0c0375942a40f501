"""The softmax of a tile: scores of keys become weights, with the peaks and sums of every query."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .block_formats import shuffle
from .lanes import (
    I32,
    I64,
    INTEGERS,
    LANES,
    VECTOR,
    VECTORS,
    addresses,
    at,
    call_vector,
    floats,
    fma,
    integers,
    load,
    maximum,
    splat,
    store,
)
from .tile_products import BFLOATS, HAS_BFLOAT16_PRODUCTS

_SHORTS = ir.VectorType(ir.IntType(16), 2 * LANES)
_HIDDEN = -1e30  # the score of a key that a query does not see


def _pair(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Pairs of positive float32 numbers rounded to bfloat16, <16 x i32>."""
    if HAS_BFLOAT16_PRODUCTS:
        rounded = call_vector(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", second, first, kind=BFLOATS)
        places = [LANES * (n % 2) + n // 2 for n in range(2 * LANES)]
        return b.bitcast(shuffle(b, b.bitcast(rounded, _SHORTS), places), INTEGERS)
    low, high = (b.add(b.bitcast(x, INTEGERS), integers(0x8000)) for x in (first, second))
    return b.or_(b.lshr(low, integers(16)), b.and_(high, integers(0xFFFF0000)))


# 2^x = 2^k 2^r with k a whole number and |r| <= 1/2. There, the series to r^5 has an error of 3e-6. A weight is rounded
# to bfloat16, which has an error of 2e-3, so it gets a polynomial of degree 3 with an error of 1e-4: that whose largest
# relative error is least, with exactly 1 at 0.
_SERIES = [math.log(2) ** n / math.factorial(n) for n in range(6)]
_FOR_WEIGHTS = [1, 0.6932829, 0.2422110, 0.0550089]
_ROUNDER = 1.5 * 2**23  # x + this has the nearest whole number in its last bits


def _exp2(b: ir.IRBuilder, x: ir.Value, polynomial: Sequence[float] = _SERIES) -> ir.Value:
    """2^x for x <= 126. Below -126 it may be 2^-126."""
    if HAS_BFLOAT16_PRODUCTS:  # and so the rest of AVX-512
        zeros, all_lanes, rounding = floats(0), ir.Constant(ir.IntType(16), -1), I32(4)
        options = (zeros, all_lanes, rounding)
        rest = call_vector(b, "llvm.x86.avx512.mask.reduce.ps.512", x, I32(0), *options)
        value = _value(b, polynomial, rest)
        return call_vector(b, "llvm.x86.avx512.mask.scalef.ps.512", value, b.fsub(x, rest), *options)
    x = maximum(b, x, floats(-126))
    shifted = b.fadd(x, floats(_ROUNDER))
    value = _value(b, polynomial, b.fsub(x, b.fsub(shifted, floats(_ROUNDER))))
    exponent = b.shl(b.bitcast(shifted, INTEGERS), integers(23))
    return b.bitcast(b.add(b.bitcast(value, INTEGERS), exponent), VECTOR)


def _value(b: ir.IRBuilder, polynomial: Sequence[float], x: ir.Value) -> ir.Value:
    value = floats(polynomial[-1])
    for factor in polynomial[-2::-1]:
        value = fma(b, value, x, floats(factor))
    return value


@intrinsic
def hide(
    _context: Any, scores: Any, keys: Any, first: Any, lows: Any, highs: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Hide from every query the keys before its low and from its high on. `first` is the index of the first key."""

    def generate(b: ir.IRBuilder, scores: ir.Value, *rest: ir.Value) -> None:
        keys, first, lows, highs = rest
        limits = [[load(b, at(b, x, 0, k), INTEGERS) for x in (lows, highs)] for k in range(VECTORS)]
        with cgutils.for_range(b, keys) as loop:
            key = splat(b, b.trunc(b.add(first, loop.index), I32))
            for k, (low, high) in enumerate(limits):
                place = at(b, scores, loop.index, k)
                seen = b.and_(b.icmp_signed(">=", key, low), b.icmp_signed("<", key, high))
                store(b, place, b.select(seen, load(b, place), floats(_HIDDEN)))

    return addresses(5, generate)


@intrinsic
def cap_scores(_context: Any, scores: Any, keys: Any, cap: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Scores s become c tanh(s / c), with tanh x = 1 - 2 / (1 + e^2x)."""

    def code(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        scores, keys, cap = args
        cap = splat(b, cap)
        factor = b.fdiv(floats(2 / math.log(2)), cap)
        with cgutils.for_range(b, keys) as loop:
            for k in range(VECTORS):
                place = at(b, scores, loop.index, k)
                x = call_vector(b, "llvm.minnum.v16f32", b.fmul(load(b, place), factor), floats(126))
                tanh = b.fsub(floats(1), b.fdiv(floats(2), b.fadd(floats(1), _exp2(b, x))))
                store(b, place, b.fmul(cap, tanh))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), code


@intrinsic
def scale(_context: Any, rows: Any, count: Any, factors: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Multiply `count` rows by `factors`."""

    def generate(b: ir.IRBuilder, rows: ir.Value, count: ir.Value, factors: ir.Value) -> None:
        factor = [load(b, at(b, factors, 0, k)) for k in range(VECTORS)]
        with cgutils.for_range(b, count) as loop:
            for k, x in enumerate(factor):
                place = at(b, rows, loop.index, k)
                store(b, place, b.fmul(load(b, place), x))

    return addresses(3, generate)


@intrinsic
def softmax(
    _context: Any, scores: Any, keys: Any, peaks: Any, sums: Any, factors: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Turn the scores of an even number of keys into weights 2^(score - peak), in half of the rows.

    Weights are bfloat16; those of two neighbouring keys are a pair.

    The peaks and sums are those of all keys so far, and `factors` of this change what was summed before.
    """

    def generate(b: ir.IRBuilder, scores: ir.Value, *rest: ir.Value) -> None:
        keys, peaks, sums, factors = rest
        before = [load(b, at(b, peaks, 0, k)) for k in range(VECTORS)]
        places = [cgutils.alloca_once_value(b, x) for x in before]
        with cgutils.for_range(b, keys) as loop:
            for k, place in enumerate(places):
                b.store(maximum(b, b.load(place), load(b, at(b, scores, loop.index, k))), place)
        peak = [b.load(place) for place in places]
        for k, place in enumerate(places):
            factor = _exp2(b, b.fsub(before[k], peak[k]))
            store(b, at(b, peaks, 0, k), peak[k])
            store(b, at(b, factors, 0, k), factor)
            b.store(b.fmul(load(b, at(b, sums, 0, k)), factor), place)
        with cgutils.for_range(b, b.lshr(keys, I64(1))) as loop:
            row = b.shl(loop.index, I64(1))
            for k, place in enumerate(places):
                first, second = (
                    _exp2(b, b.fsub(load(b, at(b, scores, b.add(row, I64(n)), k)), peak[k]), _FOR_WEIGHTS)
                    for n in (0, 1)
                )
                b.store(b.fadd(b.load(place), b.fadd(first, second)), place)
                store(b, at(b, scores, loop.index, k), _pair(b, first, second))
        for k, place in enumerate(places):
            store(b, at(b, sums, 0, k), b.load(place))

    return addresses(5, generate)
