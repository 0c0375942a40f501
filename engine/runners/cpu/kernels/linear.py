"""Products of a weight matrix and a few vectors. Their speed is that of reading the weights from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .by_address import inner
from .simd import (
    VECTOR,
    call_llvm,
    get,
    load,
    prefetch,
    reduced,
    size_of,
    split,
    store,
    two_vectors,
)

_AHEAD = {1: 2304, 2: 4096}  # by the rows that are read together: bytes by which weights are prefetched

_I64 = ir.IntType(64)


def target_has(feature: str) -> bool:
    """True if the CPU for which numba compiles has a feature, in LLVM's name."""
    if numba.config.CPU_NAME in (None, "host") and numba.config.CPU_FEATURES is None:
        return bool(llvm.get_host_cpu_features().get(feature, False))
    return f"+{feature}" in (numba.config.CPU_FEATURES or "")


_ROWS = 2 if target_has("avx512vl") else 1  # rows for eight and more vectors: the sums of two need 32 registers


def _dot_of(rows: int, tokens: int) -> Any:
    """A function of numba: `rows` rows of weights times `tokens` consecutive vectors, as `rows` * `tokens` numbers.

    Each is a sum in the same order for any `rows` and `tokens`. For a single vector the weights are one stream, which
    the CPU prefetches itself; for more vectors it sees it too late, and they are prefetched here.
    """

    def dot(_context: Any, kind: Any, row: Any, columns: Any, x: Any) -> tuple[Any, Callable[..., ir.Value]]:
        dtype = kind.dtype
        size = dtype.bitwidth // 8

        def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            _, row, columns, x = args
            sums = [cgutils.alloca_once_value(b, ir.Constant(VECTOR, [0.0] * 8)) for _ in range(2 * rows * tokens)]
            starts = [b.add(row, b.mul(columns, _I64(size * r))) for r in range(rows)]
            vectors = [b.add(x, b.mul(columns, _I64(4 * t))) for t in range(tokens)]
            with cgutils.for_range(b, b.udiv(columns, _I64(16))) as loop:
                place = b.mul(loop.index, _I64(16))
                weights = []
                for start in starts:
                    if tokens > 1:
                        prefetch(b, b.add(start, b.add(b.mul(place, _I64(size)), _I64(_AHEAD[rows]))))
                    weights.append(two_vectors(b, dtype, start, place))
                for t, vector in enumerate(vectors):
                    numbers = two_vectors(b, types.float32, vector, place)
                    for r, pair in enumerate(weights):
                        for k in (0, 1):
                            total = sums[2 * (r * tokens + t) + k]
                            b.store(call_llvm(b, "fma", pair[k], numbers[k], b.load(total)), total)
            both = [b.fadd(b.load(even), b.load(odd)) for even, odd in zip(sums[::2], sums[1::2], strict=True)]
            results = [reduced(b, x, lambda b, low, high: b.fadd(low, high)) for x in both]
            return context.make_tuple(b, signature.return_type, results)

        return types.UniTuple(types.float32, rows * tokens)(kind, *[types.int64] * 3), generate

    return intrinsic(dot)


_dot, _dot_4, _dots_4 = _dot_of(1, 1), _dot_of(1, 4), _dot_of(_ROWS, 4)


def arranged_for(kind, x, tokens, columns):
    """The vectors [tokens, columns] at address `x` in the order in which `load_two` reads weights of `kind`, float32.

    Empty where that is their own order.
    """


@overload(arranged_for)
def _arranged_for(kind, x, tokens, columns):
    if kind.dtype != types.uint16:
        return lambda kind, x, tokens, columns: np.empty(0, np.float32)

    def in_pairs(kind, x, tokens, columns):
        out = np.empty(tokens * columns, np.float32)
        for c in range(0, tokens * columns, 16):
            even, odd = split(load(np.float32, x, c), load(np.float32, x, c + 8))
            store(out.ctypes.data, c, even)
            store(out.ctypes.data, c + 8, odd)
        return out

    return in_pairs


@inner
def rows_of(part, parts, count):
    """The rows [start, stop) of one part, if `count` rows are split into parts of a multiple of 8 rows."""
    size = ((count + parts - 1) // parts + 7) // 8 * 8
    return min(part * size, count), min((part + 1) * size, count)


@inner
def _put(products, tokens, scales, bias, row, out, token, offset):
    """Write products with `tokens` vectors, scaled and shifted: those of `row`, then those of the next row."""
    for k in range(len(products)):
        r = row + k // tokens
        scale = get(scales, r) if scales else np.float32(1)
        shift = get(bias, r) if bias else np.float32(0)
        out[token + k % tokens, offset + r] = products[k] * scale + shift


@inner
def project_rows(kind, linear, x, tokens, start, stop, out, offset):
    """Rows [start, stop) of a matrix times `tokens` vectors, into the columns of `out` from `offset` on.

    Args:
        linear: int64: the addresses of weights, scales and bias (0 for none), and the number of rows and of columns,
            which is a multiple of 16.
        x: the address of float32 [tokens, columns].
    """
    weights, scales, bias, columns = linear[0], linear[1], linear[2], linear[4]
    arranged = arranged_for(kind, x, tokens, columns)
    vectors = arranged.ctypes.data if len(arranged) else x
    step = size_of(kind) * columns
    r = start
    while r < stop:
        rows = _ROWS if tokens >= 8 and r + _ROWS <= stop else 1
        row, t = weights + step * r, 0
        while t + 4 <= tokens:
            vector = vectors + 4 * t * columns
            if rows == _ROWS:
                _put(_dots_4(kind, row, columns, vector), 4, scales, bias, r, out, t, offset)
            else:
                _put(_dot_4(kind, row, columns, vector), 4, scales, bias, r, out, t, offset)
            t += 4
        while t < tokens:
            for k in range(rows):
                products = _dot(kind, row + step * k, columns, vectors + 4 * t * columns)
                _put(products, 1, scales, bias, r + k, out, t, offset)
            t += 1
        r += rows
    return len(arranged)  # numba frees an array after the last line that names it
