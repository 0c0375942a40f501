"""Attention of single queries over a cache, in parts of a fixed number of keys, which are joined afterwards.

One thread computes a part: the query heads of one group over up to `PART` keys. The parts of a query depend on its own
keys only, and not on the threads or the batch. So the bits of its result do not depend on them either.

Shape letters: G query heads of a group, D head dim.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from .by_address import compiled, inner, pointer
from .linear import arranged_for
from .simd import (
    add,
    div,
    exp,
    fetch,
    fma,
    get,
    in_order,
    largest,
    load,
    load_two,
    maximum,
    mul,
    put,
    splat,
    store,
    store_halves,
    sub,
    total,
    totals,
)

PART = 256  # keys of the largest part
_AHEAD = 16  # keys are prefetched this many keys before their use
_BLOCK = 32  # keys whose values stay in the L1 cache while all heads and columns read them

_LEAST = np.float32(-1e30)


def part(kind: type, rotates: bool) -> Any:
    """Softmax attention of G queries over `count` keys of a kind, not yet divided by its weight.

    Args:
        rotates: whether keys are rotated first, by `shift`.

    Returns:
        The compiled function of these 64-bit integers:
        keys, values: addresses of [count, D] of `kind`.
        key_scales, value_scales: addresses of the scales of int8 keys and values, float32 [count], or 0.
        count: of the keys.
        shift: address of the cosines and sines by which the keys are rotated first, float32 [count, 2, d / 2].
        q: address of float32 [G, D], already multiplied by the factor on the scores.
        G: of the queries.
        about: address of the `shape` that `step` takes.
        softcap: address of the soft-cap of the scores or 0, float32.
        out: address of the result, float32 [G, D]: the weighted sums of values.
        peaks, sums: addresses of results, float32 [G]: the largest score, and the sum of e^(score - peak).
    """
    return compiled(_part, kind, rotates)


def _part(kind, rotates):
    def part(keys, values, key_scales, value_scales, count, shift, q, G, about, softcap, out, peaks, sums):
        shape, cap = carray(pointer(np.int64, about), 8), get(softcap, 0)
        D, row_of_shift = shape[2], 4 * shape[6]
        scratch = np.empty(G * PART, np.float32)
        scores, arranged = scratch.ctypes.data, arranged_for(kind, q, G, D)
        if rotates:
            rotated = np.empty(_BLOCK * D, np.float32)
            for first in range(0, count, _BLOCK):
                n = min(_BLOCK, count - first)
                _rotate_keys(shape, kind, keys, first, n, shift + row_of_shift * first, rotated.ctypes.data)
                _scores(np.float32, rotated.ctypes.data, n, q, G, D, scores + 4 * first)
        else:
            _scores(kind, keys, count, np.int64(arranged.ctypes.data) if len(arranged) else q, G, D, scores)
            if len(arranged):
                arranged[0] = 0  # numba frees an array after the last line that names it
        padded = (count + 7) // 8 * 8
        for g in range(G):
            row = scores + 4 * g * PART
            if key_scales:
                _scale(row, count, key_scales)
            if cap > 0:
                _cap(row, padded, cap)
            for j in range(count, padded):
                scratch[g * PART + j] = _LEAST
            highest, sum_ = _softmax(row, padded)
            put(peaks, g, highest)
            put(sums, g, sum_)
            for j in range(count, padded):
                scratch[g * PART + j] = np.float32(0)
            if value_scales:
                _scale(row, count, value_scales)
        for g in range(G):
            for d in range(0, D, 8):
                store(out, g * D + d, splat(np.float32(0)))
        for first in range(0, count, _BLOCK):
            n = min(_BLOCK, count - first)
            if first + n < count:
                fetch(kind, values, (first + n) * D, min(_BLOCK, count - first - n) * D)
            g = 0
            while g < G:
                # `scratch` must be named here: numba frees an array after the last line that names it
                row, target = scratch.ctypes.data + 4 * (g * PART + first), out + 4 * g * D
                if G - g >= 3 and G - g != 4:
                    _values_of_3(kind, values, first, n, row, D, target)
                    g += 3
                elif G - g >= 2:
                    _values_of_2(kind, values, first, n, row, D, target)
                    g += 2
                else:
                    _values_of_1(kind, values, first, n, row, D, target)
                    g += 1

    return part


@inner
def _rotate_keys(shape, kind, keys, first, count, angles, out):
    """Write keys [first, first + count) of `keys`, widened and rotated by `angles` (float32 [count, 2, d / 2])."""
    D, start, half, neighbours = shape[2], shape[5], shape[6] // 2, shape[7]
    vectors = 0 if neighbours else half // 8 * 8  # pairs that are rotated eight at a time
    for j in range(count):
        key, row, cos, sin = (first + j) * D, out + 4 * j * D, angles + 8 * j * half, angles + 8 * j * half + 4 * half
        if 2 * vectors < D:
            for d in range(0, D, 8):
                store(row, d, load(kind, keys, key + d))
        for k in range(start, start + vectors, 8):
            x, y = load(kind, keys, key + k), load(kind, keys, key + half + k)
            c, s = load(np.float32, cos, k - start), load(np.float32, sin, k - start)
            store(row, k, sub(mul(x, c), mul(y, s)))
            store(row, half + k, fma(y, c, mul(x, s)))
        for k in range(vectors, half):
            a = start + (2 * k if neighbours else k)
            b = a + (1 if neighbours else half)
            u, v = get(row, a), get(row, b)
            put(row, a, u * get(cos, k) - v * get(sin, k))
            put(row, b, v * get(cos, k) + u * get(sin, k))


@inner
def _scores(kind, keys, count, q, G, D, out):
    """The scores of G queries, float32 [G, PART]. Up to three heads are computed together."""
    g = 0
    while g < G:
        if G - g >= 3 and G - g != 4:
            _scores_of_3(kind, keys, count, q + 4 * g * D, D, out + 4 * g * PART)
            g += 3
        elif G - g >= 2:
            _scores_of_2(kind, keys, count, q + 4 * g * D, D, out + 4 * g * PART)
            g += 2
        else:
            _scores_of_1(kind, keys, count, q + 4 * g * D, D, out + 4 * g * PART)
            g += 1


# Scores of one, two or three heads together, so that a key is widened once for all of them. Sixteen registers hold
# the sums, and eight sums become one vector. In place of keys after the last one, the last one is read again.


@inner
def _scores_of_1(kind, keys, count, q, D, out):
    for j in range(0, count, 8):
        last = (count - 1) * D
        i = j * D
        i1, i2, i3 = min(i + D, last), min(i + 2 * D, last), min(i + 3 * D, last)
        i4, i5, i6, i7 = min(i + 4 * D, last), min(i + 5 * D, last), min(i + 6 * D, last), min(i + 7 * D, last)
        a = b = c = d = e = f = g = h = splat(np.float32(0))
        for k in range(0, D, 16):
            x, y = load_two(np.float32, q, k)
            a, b = _two(kind, keys, i + k, x, y, a), _two(kind, keys, i1 + k, x, y, b)
            c, d = _two(kind, keys, i2 + k, x, y, c), _two(kind, keys, i3 + k, x, y, d)
            e, f = _two(kind, keys, i4 + k, x, y, e), _two(kind, keys, i5 + k, x, y, f)
            g, h = _two(kind, keys, i6 + k, x, y, g), _two(kind, keys, i7 + k, x, y, h)
        store(out, j, totals(a, b, c, d, e, f, g, h))


@inner
def _two(kind, keys, index, x, y, total):
    v, w = load_two(kind, keys, index)
    return fma(w, y, fma(v, x, total))


@inner
def _scores_of_2(kind, keys, count, q, D, out):
    last = (count - 1) * D
    for j in range(0, count, 4):
        i = j * D
        i1, i2, i3 = min(i + D, last), min(i + 2 * D, last), min(i + 3 * D, last)
        fetch(kind, keys, i + _AHEAD * D, 4 * D)
        a = b = c = d = e = f = g = h = splat(np.float32(0))
        for k in range(0, D, 16):
            x, m = load_two(np.float32, q, k)
            y, n = load_two(np.float32, q, D + k)
            v, w = load_two(kind, keys, i + k)
            a, e = fma(w, m, fma(v, x, a)), fma(w, n, fma(v, y, e))
            v, w = load_two(kind, keys, i1 + k)
            b, f = fma(w, m, fma(v, x, b)), fma(w, n, fma(v, y, f))
            v, w = load_two(kind, keys, i2 + k)
            c, g = fma(w, m, fma(v, x, c)), fma(w, n, fma(v, y, g))
            v, w = load_two(kind, keys, i3 + k)
            d, h = fma(w, m, fma(v, x, d)), fma(w, n, fma(v, y, h))
        store_halves(out, j, out, PART + j, totals(a, b, c, d, e, f, g, h))


@inner
def _scores_of_3(kind, keys, count, q, D, out):
    last = (count - 1) * D
    for j in range(0, count, 4):
        i = j * D
        i1, i2, i3 = min(i + D, last), min(i + 2 * D, last), min(i + 3 * D, last)
        fetch(kind, keys, i + _AHEAD * D, 4 * D)
        a = b = c = d = e = f = g = h = r = s = t = u = splat(np.float32(0))
        for k in range(0, D, 16):
            x, m = load_two(np.float32, q, k)
            y, n = load_two(np.float32, q, D + k)
            z, o = load_two(np.float32, q, 2 * D + k)
            v, w = load_two(kind, keys, i + k)
            a, e, r = fma(w, m, fma(v, x, a)), fma(w, n, fma(v, y, e)), fma(w, o, fma(v, z, r))
            v, w = load_two(kind, keys, i1 + k)
            b, f, s = fma(w, m, fma(v, x, b)), fma(w, n, fma(v, y, f)), fma(w, o, fma(v, z, s))
            v, w = load_two(kind, keys, i2 + k)
            c, g, t = fma(w, m, fma(v, x, c)), fma(w, n, fma(v, y, g)), fma(w, o, fma(v, z, t))
            v, w = load_two(kind, keys, i3 + k)
            d, h, u = fma(w, m, fma(v, x, d)), fma(w, n, fma(v, y, h)), fma(w, o, fma(v, z, u))
        store_halves(out, j, out, PART + j, totals(a, b, c, d, e, f, g, h))
        store_halves(out, 2 * PART + j, out, 2 * PART + j, totals(r, s, t, u, r, s, t, u))


@inner
def _scale(row, count, scales):
    for j in range(0, count - count % 8, 8):
        store(row, j, mul(load(np.float32, row, j), load(np.float32, scales, j)))
    for j in range(count - count % 8, count):
        put(row, j, get(row, j) * get(scales, j))


@inner
def _cap(row, count, softcap):
    """Scores s become c tanh(s / c), with tanh x = 1 - 2 / (1 + e^2x)."""
    one, two = splat(np.float32(1)), splat(np.float32(2))
    factor, cap = splat(np.float32(2 / softcap)), splat(np.float32(softcap))
    for j in range(0, count, 8):
        weight = add(one, exp(mul(load(np.float32, row, j), factor)))
        store(row, j, mul(cap, sub(one, div(two, weight))))


@inner
def _softmax(row, count):
    """Replace scores by e^(score - peak), and return the peak and the sum."""
    highest = splat(_LEAST)
    for j in range(0, count, 8):
        highest = maximum(highest, load(np.float32, row, j))
    peak = largest(highest)
    shift, weight = splat(peak), splat(np.float32(0))
    for j in range(0, count, 8):
        x = exp(sub(load(np.float32, row, j), shift))
        store(row, j, x)
        weight = add(weight, x)
    return peak, total(weight)


@inner
def _accumulate(kind, out, index, x, y):
    """Add sixteen numbers, in the order of `load_two`, to the result."""
    x, y = in_order(kind, x, y)
    store(out, index, add(load(np.float32, out, index), x))
    store(out, index + 8, add(load(np.float32, out, index + 8), y))


# Weighted sums of the values, sixteen numbers of a head at a time, for one, two or three heads together.


@inner
def _values_of_1(kind, values, first, count, weights, D, out):
    for d in range(0, D, 16):
        a = b = c = e = f = g = h = i = splat(np.float32(0))
        for j in range(0, count - count % 4, 4):
            k = (first + j) * D + d
            w, x = splat(get(weights, j)), splat(get(weights, j + 1))
            y, z = splat(get(weights, j + 2)), splat(get(weights, j + 3))
            m, n = load_two(kind, values, k)
            a, b = fma(w, m, a), fma(w, n, b)
            m, n = load_two(kind, values, k + D)
            c, e = fma(x, m, c), fma(x, n, e)
            m, n = load_two(kind, values, k + 2 * D)
            f, g = fma(y, m, f), fma(y, n, g)
            m, n = load_two(kind, values, k + 3 * D)
            h, i = fma(z, m, h), fma(z, n, i)
        for j in range(count - count % 4, count):
            w = splat(get(weights, j))
            m, n = load_two(kind, values, (first + j) * D + d)
            a, b = fma(w, m, a), fma(w, n, b)
        _accumulate(kind, out, d, add(add(a, c), add(f, h)), add(add(b, e), add(g, i)))


@inner
def _values_of_2(kind, values, first, count, weights, D, out):
    for d in range(0, D, 16):
        a = b = c = e = f = g = h = i = splat(np.float32(0))
        for j in range(0, count - count % 2, 2):
            k = (first + j) * D + d
            v, w = load_two(kind, values, k)
            x, y = splat(get(weights, j)), splat(get(weights, PART + j))
            a, b, c, e = fma(x, v, a), fma(x, w, b), fma(y, v, c), fma(y, w, e)
            v, w = load_two(kind, values, k + D)
            x, y = splat(get(weights, j + 1)), splat(get(weights, PART + j + 1))
            f, g, h, i = fma(x, v, f), fma(x, w, g), fma(y, v, h), fma(y, w, i)
        if count % 2:
            k = (first + count - 1) * D + d
            v, w = load_two(kind, values, k)
            x, y = splat(get(weights, count - 1)), splat(get(weights, PART + count - 1))
            a, b, c, e = fma(x, v, a), fma(x, w, b), fma(y, v, c), fma(y, w, e)
        _accumulate(kind, out, d, add(a, f), add(b, g))
        _accumulate(kind, out, D + d, add(c, h), add(e, i))


@inner
def _values_of_3(kind, values, first, count, weights, D, out):
    for d in range(0, D, 16):
        a = b = c = e = f = g = h = i = m = n = o = r = splat(np.float32(0))
        for j in range(0, count - count % 2, 2):
            k = (first + j) * D + d
            v, w = load_two(kind, values, k)
            x, y, z = splat(get(weights, j)), splat(get(weights, PART + j)), splat(get(weights, 2 * PART + j))
            a, b, c, e, m, n = fma(x, v, a), fma(x, w, b), fma(y, v, c), fma(y, w, e), fma(z, v, m), fma(z, w, n)
            j += 1
            v, w = load_two(kind, values, k + D)
            x, y, z = splat(get(weights, j)), splat(get(weights, PART + j)), splat(get(weights, 2 * PART + j))
            f, g, h, i, o, r = fma(x, v, f), fma(x, w, g), fma(y, v, h), fma(y, w, i), fma(z, v, o), fma(z, w, r)
        if count % 2:
            j = count - 1
            v, w = load_two(kind, values, (first + j) * D + d)
            x, y, z = splat(get(weights, j)), splat(get(weights, PART + j)), splat(get(weights, 2 * PART + j))
            a, b, c, e, m, n = fma(x, v, a), fma(x, w, b), fma(y, v, c), fma(y, w, e), fma(z, v, m), fma(z, w, n)
        _accumulate(kind, out, d, add(a, f), add(b, g))
        _accumulate(kind, out, D + d, add(c, h), add(e, i))
        _accumulate(kind, out, 2 * D + d, add(m, o), add(n, r))


@inner
def join(outs, peaks, weights, first, stop, h, D, result):
    """Join the parts [first, stop) of one head of a query: `outs` [parts, heads, D] -> `result` [heads * D]."""
    peak = peaks[first, h]
    for p in range(first + 1, stop):
        peak = max(peak, peaks[p, h])
    whole = np.float32(0)
    for d in range(D):
        result[h * D + d] = np.float32(0)
    for p in range(first, stop):
        factor = np.float32(math.exp(peaks[p, h] - peak))
        whole += factor * weights[p, h]
        f = splat(factor)
        source, target = outs[p, h].ctypes.data, result.ctypes.data
        for d in range(0, D, 8):
            store(target, h * D + d, fma(f, load(np.float32, source, d), load(np.float32, target, h * D + d)))
    for d in range(D):
        result[h * D + d] /= whole
