"""Attention of many queries with bfloat16 products and float32 sums, for CPUs with AVX512-BF16.

A tile is 64 queries of heads that read the same keys. Everything about a tile is stored with one query a lane: scores
[keys, 64], weights [pairs of keys, 64], results [D, 64]. So the softmax runs down the columns, without sums across
lanes, and the rounded weights are already the operand of the second product. Both products multiply one number of a
key or value, the same for all lanes, with the vectors of a tile.

`vdpbf16ps` multiplies pairs: queries are stored as pairs of neighbouring numbers of a head, values as pairs of
neighbouring keys. On other CPUs the same kernels run with two float32 products, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import float32, int32, int64, types
from numba.core import cgutils
from numba.extending import intrinsic

from .block_formats import load_from, shuffle
from .by_address import Arguments, inner
from .linear import target_has

TILE = 64  # queries
_BLOCK = 128  # keys whose scores are held at a time
_LANES = 16
_VECTORS = TILE // _LANES
_ROWS = 4  # keys, or numbers of a value, that are multiplied together: 4 x 4 sums stay in registers

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTEGERS, _SHORTS = (ir.VectorType(kind, _LANES) for kind in (_F32, _I32, _I16))
_ROW = 4 * TILE  # bytes of a row of a tile

_HIDDEN = -1e30  # the score of a key that a query does not see

HAS_BFLOAT16_PRODUCTS = target_has("avx512bf16")
"""True if this CPU multiplies pairs of bfloat16 numbers in one instruction."""


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _at(b: ir.IRBuilder, address: ir.Value, row: ir.Value | int, vector: int) -> ir.Value:
    """The address of a vector of a row of a tile."""
    row = _I64(row) if isinstance(row, int) else row
    return b.add(address, b.add(b.mul(row, _I64(_ROW)), _I64(4 * _LANES * vector)))


def _load(b: ir.IRBuilder, address: ir.Value, kind: ir.Type = _VECTOR) -> ir.Value:
    return load_from(b, address, kind)


def _store(b: ir.IRBuilder, address: ir.Value, x: ir.Value) -> None:
    b.store(x, b.inttoptr(address, x.type.as_pointer()), align=1)


def _floats(x: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(np.float32(x))] * _LANES)


def _integers(x: int) -> ir.Constant:
    return ir.Constant(_INTEGERS, [x] * _LANES)


def _splat(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    kind = ir.VectorType(x.type, _LANES)
    return shuffle(b, b.insert_element(ir.Constant(kind, ir.Undefined), x, _I32(0)), [0] * _LANES)


def _call(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_VECTOR, [x.type for x in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return _call(b, "llvm.maxnum.v16f32", x, y)


def _fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(b, "llvm.fma.v16f32", x, y, z)


def _halves(b: ir.IRBuilder, pairs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The first and the second bfloat16 number of each pair, as float32."""
    return (
        b.bitcast(b.shl(pairs, _integers(16)), _VECTOR),
        b.bitcast(b.and_(pairs, _integers(0xFFFF0000)), _VECTOR),
    )


def _add_products(b: ir.IRBuilder, total: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """total + the products of two pairs of bfloat16 numbers, <16 x i32>, in each lane."""
    if HAS_BFLOAT16_PRODUCTS:
        pairs = ir.VectorType(_BFloat16(), 2 * _LANES)
        return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", total, b.bitcast(x, pairs), b.bitcast(y, pairs))
    (x_first, x_second), (y_first, y_second) = _halves(b, x), _halves(b, y)
    return _fma(b, x_second, y_second, _fma(b, x_first, y_first, total))


def _pair(b: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Pairs of positive float32 numbers rounded to bfloat16, <16 x i32>."""
    low, high = (b.add(b.bitcast(x, _INTEGERS), _integers(0x8000)) for x in (first, second))
    return b.or_(b.lshr(low, _integers(16)), b.and_(high, _integers(0xFFFF0000)))


# 2^x = 2^k 2^r with k a whole number and |r| <= 1/2. There, the series to r^5 has an error of 3e-6; a weight is rounded
# to bfloat16, which has an error of 2e-3.
_SERIES = [math.log(2) ** n / math.factorial(n) for n in range(6)]
_ROUNDER = 1.5 * 2**23  # x + this has the nearest whole number in its last bits


def _exp2(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """2^x for x <= 126. Below -126, x counts as -126."""
    x = _maximum(b, x, _floats(-126))
    shifted = b.fadd(x, _floats(_ROUNDER))
    rest = b.fsub(x, b.fsub(shifted, _floats(_ROUNDER)))
    value = _floats(_SERIES[-1])
    for factor in _SERIES[-2::-1]:
        value = _fma(b, value, rest, _floats(factor))
    exponent = b.shl(b.bitcast(shifted, _INTEGERS), _integers(23))
    return b.bitcast(b.add(b.bitcast(value, _INTEGERS), exponent), _VECTOR)


def _multiply(
    b: ir.IRBuilder,
    rows: Sequence[ir.Value],
    row_step: ir.Value | int,
    tile: ir.Value,
    pairs: ir.Value,
    sums: list[ir.Value],
) -> list[ir.Value]:
    """Add to `sums` [rows, vectors] the products of `pairs` pairs of every row with those of a tile.

    Args:
        rows: the addresses of the first pair of each row; the next pair is `row_step` bytes further.
        tile: the address of [pairs, 64] pairs.
    """
    places = [cgutils.alloca_once_value(b, x) for x in sums]
    step = _I64(row_step) if isinstance(row_step, int) else row_step
    with cgutils.for_range(b, pairs) as loop:
        vectors = [_load(b, _at(b, tile, loop.index, k), _INTEGERS) for k in range(_VECTORS)]
        for r, row in enumerate(rows):
            pair = _splat(b, _load(b, b.add(row, b.mul(loop.index, step)), _I32))
            for k, vector in enumerate(vectors):
                place = places[r * _VECTORS + k]
                b.store(_add_products(b, b.load(place), pair, vector), place)
    return [b.load(place) for place in places]


def _addresses(count: int, generate: Callable[..., None]) -> tuple[Any, Callable[..., ir.Value]]:
    """The type and the code of an intrinsic that takes addresses and counts, int64, and returns nothing."""

    def code(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        generate(b, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * count), code


@intrinsic
def _scores(
    _context: Any, tile: Any, key_0: Any, key_1: Any, key_2: Any, key_3: Any, pairs: Any, out: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Four rows of scores, for four keys."""

    def generate(b: ir.IRBuilder, tile: ir.Value, *rest: ir.Value) -> None:
        *keys, pairs, out = rest
        sums = _multiply(b, keys, 4, tile, pairs, [_floats(0)] * _ROWS * _VECTORS)
        for n, x in enumerate(sums):
            _store(b, _at(b, out, *divmod(n, _VECTORS)), x)

    return _addresses(7, generate)


@intrinsic
def _add_values(
    _context: Any, weights: Any, value: Any, stride: Any, pairs: Any, factors: Any, out: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Four rows of results times `factors`, plus four numbers of each value times the weights."""

    def generate(b: ir.IRBuilder, weights: ir.Value, value: ir.Value, *rest: ir.Value) -> None:
        stride, pairs, factors, out = rest
        factor = [_load(b, _at(b, factors, 0, k)) for k in range(_VECTORS)]
        places = [_at(b, out, *divmod(n, _VECTORS)) for n in range(_ROWS * _VECTORS)]
        sums = [b.fmul(_load(b, place), factor[n % _VECTORS]) for n, place in enumerate(places)]
        rows = [b.add(value, _I64(4 * r)) for r in range(_ROWS)]
        for place, x in zip(places, _multiply(b, rows, stride, weights, pairs, sums), strict=True):
            _store(b, place, x)

    return _addresses(6, generate)


@intrinsic
def _hide(
    _context: Any, scores: Any, keys: Any, first: Any, lows: Any, highs: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Hide from every query the keys before its low and from its high on. `first` is the index of the first key."""

    def generate(b: ir.IRBuilder, scores: ir.Value, *rest: ir.Value) -> None:
        keys, first, lows, highs = rest
        limits = [[_load(b, _at(b, x, 0, k), _INTEGERS) for x in (lows, highs)] for k in range(_VECTORS)]
        with cgutils.for_range(b, keys) as loop:
            key = _splat(b, b.trunc(b.add(first, loop.index), _I32))
            for k, (low, high) in enumerate(limits):
                place = _at(b, scores, loop.index, k)
                seen = b.and_(b.icmp_signed(">=", key, low), b.icmp_signed("<", key, high))
                _store(b, place, b.select(seen, _load(b, place), _floats(_HIDDEN)))

    return _addresses(5, generate)


@intrinsic
def _cap(_context: Any, scores: Any, keys: Any, cap: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Scores s become c tanh(s / c), with tanh x = 1 - 2 / (1 + e^2x)."""

    def code(context: Any, b: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        scores, keys, cap = args
        cap = _splat(b, cap)
        factor = b.fdiv(_floats(2 / math.log(2)), cap)
        with cgutils.for_range(b, keys) as loop:
            for k in range(_VECTORS):
                place = _at(b, scores, loop.index, k)
                x = _call(b, "llvm.minnum.v16f32", b.fmul(_load(b, place), factor), _floats(126))
                tanh = b.fsub(_floats(1), b.fdiv(_floats(2), b.fadd(_floats(1), _exp2(b, x))))
                _store(b, place, b.fmul(cap, tanh))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), code


@intrinsic
def _softmax(
    _context: Any, scores: Any, keys: Any, peaks: Any, sums: Any, factors: Any, weights: Any
) -> tuple[Any, Callable[..., ir.Value]]:
    """Turn the scores of an even number of keys into weights 2^(score - peak), as pairs of bfloat16 numbers.

    The peaks and sums are those of all keys so far, and `factors` of this change what was summed before.
    """

    def generate(b: ir.IRBuilder, scores: ir.Value, *rest: ir.Value) -> None:
        keys, peaks, sums, factors, weights = rest
        before = [_load(b, _at(b, peaks, 0, k)) for k in range(_VECTORS)]
        places = [cgutils.alloca_once_value(b, x) for x in before]
        with cgutils.for_range(b, keys) as loop:
            for k, place in enumerate(places):
                b.store(_maximum(b, b.load(place), _load(b, _at(b, scores, loop.index, k))), place)
        peak = [b.load(place) for place in places]
        for k, place in enumerate(places):
            factor = _exp2(b, b.fsub(before[k], peak[k]))
            _store(b, _at(b, peaks, 0, k), peak[k])
            _store(b, _at(b, factors, 0, k), factor)
            b.store(b.fmul(_load(b, _at(b, sums, 0, k)), factor), place)
        with cgutils.for_range(b, b.lshr(keys, _I64(1))) as loop:
            row = b.shl(loop.index, _I64(1))
            for k, place in enumerate(places):
                first, second = (
                    _exp2(b, b.fsub(_load(b, _at(b, scores, b.add(row, _I64(n)), k)), peak[k])) for n in (0, 1)
                )
                b.store(b.fadd(b.load(place), b.fadd(first, second)), place)
                _store(b, _at(b, weights, loop.index, k), _pair(b, first, second))
        for k, place in enumerate(places):
            _store(b, _at(b, sums, 0, k), b.load(place))

    return _addresses(6, generate)


@inner
def _tile(queries, keys, values, D, cap, lows, highs, out, peaks, sums):
    """Add the keys that the queries of a tile see to its result. Arguments as in `flash`, for one tile."""
    first, latest, stop, earliest = lows[0], lows[0], highs[0], highs[0]
    for lane in range(1, TILE):
        first, latest = min(first, lows[lane]), max(latest, lows[lane])
        stop, earliest = max(stop, highs[lane]), min(earliest, highs[lane])
    first = max(first, np.int32(0)) // 2 * 2
    scores, weights = np.empty((_BLOCK, TILE), np.float32), np.empty((_BLOCK // 2, TILE), np.int32)
    factors = np.empty(TILE, np.float32)
    for start in range(first, stop, _BLOCK):
        count = min(_BLOCK, stop - start)
        last = keys + 2 * D * (start + count - 1)  # read again in place of keys after it
        for k in range(0, count, _ROWS):
            key = keys + 2 * D * (start + k)
            _scores(
                queries,
                key,
                min(key + 2 * D, last),
                min(key + 4 * D, last),
                min(key + 6 * D, last),
                D // 2,
                scores.ctypes.data + 4 * TILE * k,
            )
        padded = (count + 1) // 2 * 2
        if cap > 0:
            _cap(scores.ctypes.data, padded, cap)
        if start < latest or start + padded > earliest:
            _hide(scores.ctypes.data, padded, start, lows.ctypes.data, highs.ctypes.data)
        _softmax(
            scores.ctypes.data,
            padded,
            peaks.ctypes.data,
            sums.ctypes.data,
            factors.ctypes.data,
            weights.ctypes.data,
        )
        for d in range(0, D, _ROWS):
            _add_values(
                weights.ctypes.data,
                values + 2 * D * start + 4 * d,
                4 * D,
                padded // 2,
                factors.ctypes.data,
                out.ctypes.data + 4 * TILE * d,
            )
    return scores[0, 0], weights[0, 0], factors[0]  # numba frees an array after the last line that names it


def flash(
    queries: Any,
    keys: int,
    key_stride: int,
    values: int,
    value_stride: int,
    cap: float,
    lows: Any,
    highs: Any,
    out: Any,
    peaks: Any,
    sums: Any,
    threads: int,
) -> None:
    """Add keys to the softmax attention of queries.

    Args:
        queries: int32 [K, tiles, D / 2, 64], pairs of bfloat16 numbers. Scores are their products with keys.
        keys: the address of the bfloat16 keys of the first head, [keys, D]; the next head is `key_stride` bytes on.
        values: the address of the pairs of values of the first head, int32 [keys / 2, D].
        cap: c in c tanh(score / c), or 0.
        lows, highs: int32 [tiles, 64]: a query sees the keys from its low to before its high. Without keys low = high.
        out: float32 [K, tiles, D, 64]: the sums of weights times values, changed in place.
        peaks: float32 [K, tiles, 64]: the largest score so far, -1e30 before the first key. Scores are powers of 2.
        sums: float32 [K, tiles, 64]: the sums of the weights 2^(score - peak) so far.
    """
    _ARGUMENTS.run(
        _share,
        threads,
        queries=queries,
        held=np.array([keys, key_stride, values, value_stride], np.int64),
        cap=np.array([cap], np.float32),
        lows=lows,
        highs=highs,
        out=out,
        peaks=peaks,
        sums=sums,
    )


_ARGUMENTS = Arguments(
    queries=int32[:, :, :, ::1],
    held=int64[::1],
    cap=float32[::1],
    lows=int32[:, ::1],
    highs=int32[:, ::1],
    out=float32[:, :, :, ::1],
    peaks=float32[:, :, ::1],
    sums=float32[:, :, ::1],
)
_arrays_at = _ARGUMENTS.arrays_at


def _share(thread, threads, address):
    """The tiles of one thread."""
    a = _arrays_at(address)
    K, tiles, D = a.queries.shape[0], a.queries.shape[1], 2 * a.queries.shape[2]
    keys, key_stride, values, value_stride = a.held[0], a.held[1], a.held[2], a.held[3]
    for n in range(thread, K * tiles, threads):
        h, t = n // tiles, n % tiles
        query, key, value = a.queries[h, t].ctypes.data, keys + key_stride * h, values + value_stride * h
        _tile(query, key, value, D, a.cap[0], a.lows[t], a.highs[t], a.out[h, t], a.peaks[h, t], a.sums[h, t])
