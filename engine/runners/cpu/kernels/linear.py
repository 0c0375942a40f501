"""Products of a weight matrix and a few vectors. Their speed is that of reading the weights from memory."""

from __future__ import annotations

import numpy as np
from numba import njit

from .simd import add, fetch, fma, get, load, size_of, splat, total

AHEAD = 4096  # weights are prefetched this many bytes before their use


@njit(cache=True)
def dot(kind, weights, row, x, columns):
    """Elements [row, row + columns) of `weights` times the float32 vector at `x`."""
    even = odd = splat(np.float32(0))
    for c in range(0, columns, 16):
        even = fma(load(kind, weights, row + c), load(np.float32, x, c), even)
        odd = fma(load(kind, weights, row + c + 8), load(np.float32, x, c + 8), odd)
    return total(add(even, odd))


@njit(cache=True)
def dot_4(kind, weights, row, x, columns):
    """`dot` with four consecutive vectors at `x`. Each result has the same bits as that of `dot`."""
    even_0 = odd_0 = even_1 = odd_1 = even_2 = odd_2 = even_3 = odd_3 = splat(np.float32(0))
    for c in range(0, columns, 16):
        w, v = load(kind, weights, row + c), load(kind, weights, row + c + 8)
        even_0, odd_0 = fma(w, load(np.float32, x, c), even_0), fma(v, load(np.float32, x, c + 8), odd_0)
        k = c + columns
        even_1, odd_1 = fma(w, load(np.float32, x, k), even_1), fma(v, load(np.float32, x, k + 8), odd_1)
        k += columns
        even_2, odd_2 = fma(w, load(np.float32, x, k), even_2), fma(v, load(np.float32, x, k + 8), odd_2)
        k += columns
        even_3, odd_3 = fma(w, load(np.float32, x, k), even_3), fma(v, load(np.float32, x, k + 8), odd_3)
    return (
        total(add(even_0, odd_0)),
        total(add(even_1, odd_1)),
        total(add(even_2, odd_2)),
        total(add(even_3, odd_3)),
    )


@njit(cache=True)
def rows_of(part, parts, count):
    """The rows [start, stop) of one part, if `count` rows are split into parts of a multiple of 8 rows."""
    size = ((count + parts - 1) // parts + 7) // 8 * 8
    return min(part * size, count), min((part + 1) * size, count)


@njit(cache=True)
def project_rows(kind, linear, x, tokens, start, stop, out, offset):
    """Rows [start, stop) of a matrix times `tokens` vectors, into the columns of `out` from `offset` on.

    Args:
        linear: int64: the addresses of weights, scales and bias (0 for none), and the number of rows and of columns,
            which is a multiple of 16.
        x: the address of float32 [tokens, columns].
    """
    weights, scales, bias, columns = linear[0], linear[1], linear[2], linear[4]
    for r in range(start, stop):
        fetch(kind, weights, r * columns + AHEAD // size_of(kind), columns)
        scale = get(scales, r) if scales else np.float32(1)
        shift = get(bias, r) if bias else np.float32(0)
        t, column = 0, offset + r
        while t + 4 <= tokens:
            a, b, c, d = dot_4(kind, weights, r * columns, x + 4 * t * columns, columns)
            out[t, column], out[t + 1, column] = a * scale + shift, b * scale + shift
            out[t + 2, column], out[t + 3, column] = c * scale + shift, d * scale + shift
            t += 4
        while t < tokens:
            out[t, column] = dot(kind, weights, r * columns, x + 4 * t * columns, columns) * scale + shift
            t += 1
