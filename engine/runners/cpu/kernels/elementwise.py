"""The parts of a decode step that compute each number of a token by itself, or a row of them: norms, activations,
rotations, and the writing of keys and values.

Shape letters: n tokens, H query heads, K key-value heads, D head dim. `shape` and `norms` are those of `step`.
"""

from __future__ import annotations

import numpy as np

from .by_address import inner
from .simd import (
    add,
    div,
    exp,
    fma,
    largest,
    load,
    maximum,
    mul,
    put,
    splat,
    store,
    store_bfloat16,
    store_int8,
    sub,
    total,
)

BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP, NORM_OF_QUERY, NORM_OF_KEY = range(6)  # norms of a layer
SILU, GELU_TANH = range(2)
DATA, SCALES, CAPACITY = range(3)  # of a buffer
KEYS, VALUES = range(2)  # buffers of a layer


@inner
def gate(x, activation, out, start, stop):
    """The columns [start, stop) of `out` [n, inner] = act(gate) * up of x [n, 2 inner]."""
    for t in range(len(x)):
        gate, up, target = x[t].ctypes.data, x[t].ctypes.data + 4 * out.shape[1], out[t].ctypes.data
        for r in range(start, stop, 8):
            store(target, r, mul(_activate(load(np.float32, gate, r), activation), load(np.float32, up, r)))


@inner
def _activate(x, activation):
    """x sigmoid(x), or GELU in its tanh form, which is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    u = x
    if activation == GELU_TANH:
        cubic = mul(mul(x, x), mul(x, splat(np.float32(0.044715))))
        u = mul(add(x, cubic), splat(np.float32(1.5957691216057308)))
    return div(x, add(one, exp(sub(zero, u))))


@inner
def _norm_row(x, weights, epsilon, count, out):
    """RMS norm of the `count` numbers at address `x`, written to address `out`."""
    squares = splat(np.float32(0))
    for c in range(0, count, 8):
        v = load(np.float32, x, c)
        squares = fma(v, v, squares)
    factor = splat(np.float32(1) / np.sqrt(total(squares) / np.float32(count) + epsilon))
    for c in range(0, count, 8):
        store(out, c, mul(mul(load(np.float32, x, c), factor), load(np.float32, weights, c)))


@inner
def rms_norm(x, weights, epsilon, out):
    """RMS norm of each row of x [n, E]; a copy if the address `weights` is 0."""
    for t in range(len(x)):
        source, target = x[t].ctypes.data, out[t].ctypes.data
        if weights:
            _norm_row(source, weights, epsilon, x.shape[1], target)
        else:
            for c in range(0, x.shape[1], 8):
                store(target, c, load(np.float32, source, c))


@inner
def add_to_residual(x, weights, epsilon, residual, scratch):
    """`residual` += x, normed if there are weights, by way of `scratch`."""
    for t in range(len(x)):
        source, target = x[t].ctypes.data, residual[t].ctypes.data
        if weights:
            _norm_row(source, weights, epsilon, x.shape[1], scratch[t].ctypes.data)
            source = scratch[t].ctypes.data
        for c in range(0, x.shape[1], 8):
            store(target, c, add(load(np.float32, target, c), load(np.float32, source, c)))


@inner
def norm_heads(shape, norms, epsilon, qkv):
    """RMS norms of the queries and keys in `qkv` [n, (H + 2 K) D], of each head or of all together, in place."""
    H, K, D, together = shape[0], shape[1], shape[2], shape[4]
    for t in range(len(qkv)):
        row = qkv[t].ctypes.data
        for which, first, heads in ((NORM_OF_QUERY, 0, H), (NORM_OF_KEY, H, K)):
            if norms[which]:
                if together:
                    _norm_row(row + 4 * first * D, norms[which], epsilon, heads * D, row + 4 * first * D)
                else:
                    for h in range(first, first + heads):
                        _norm_row(row + 4 * h * D, norms[which], epsilon, D, row + 4 * h * D)


@inner
def _rotate(shape, x, cos, sin, factor, out):
    """Rotate and scale one head."""
    D, start, rotating, neighbours = shape[2], shape[5], shape[6], shape[7]
    for d in range(D):
        out[d] = x[d] * factor
    half = rotating // 2
    for k in range(half):
        a = start + (2 * k if neighbours else k)
        b = a + (1 if neighbours else half)
        c, s = cos[k] * factor, sin[k] * factor
        out[a], out[b] = x[a] * c - x[b] * s, x[b] * c + x[a] * s


@inner
def rotate_queries(shape, qkv, rotations, scales, queries, first, stop):
    """Rotate the queries of the tokens [first, stop) for every band."""
    H, D = shape[0], shape[2]
    for band in range(len(rotations)):
        for t in range(first, stop):
            for h in range(H):
                row = qkv[t, h * D : (h + 1) * D]
                _rotate(shape, row, rotations[band, t, 0], rotations[band, t, 1], scales[t], queries[band, t, h])


@inner
def write_keys_values(shape, size, qkv, rotations, places, buffers, first, stop):
    """Write the rotated keys and the values of the tokens [first, stop) into the cache.

    Args:
        size: the bytes of a number of the cache: 4 are float32, 2 bfloat16, 1 int8.
    """
    H, K, D = shape[0], shape[1], shape[2]
    rotated = np.empty(D, np.float32)
    for t in range(first, stop):
        for h in range(K):
            key = qkv[t, (H + h) * D : (H + h + 1) * D]
            _rotate(shape, key, rotations[t, 0], rotations[t, 1], np.float32(1), rotated)
            _write_row(size, rotated.ctypes.data, D, buffers[t, KEYS], h, places[t])
            value = qkv[t, (H + K + h) * D : (H + K + h + 1) * D]
            _write_row(size, value.ctypes.data, D, buffers[t, VALUES], h, places[t])


@inner
def _write_row(size, x, D, buffer, head, place):
    row = head * buffer[CAPACITY] + place
    if size == 4:
        for d in range(0, D, 8):
            store(buffer[DATA], row * D + d, load(np.float32, x, d))
    elif size == 2:
        for d in range(0, D, 8):
            store_bfloat16(buffer[DATA], row * D + d, load(np.float32, x, d))
    else:
        highest = splat(np.float32(0))
        for d in range(0, D, 8):
            v = load(np.float32, x, d)
            highest = maximum(highest, maximum(v, sub(splat(np.float32(0)), v)))
        scale = largest(highest) / np.float32(127)
        put(buffer[SCALES], row, scale)
        inverse = splat(np.float32(1) / scale if scale > 0 else np.float32(0))
        for d in range(0, D, 8):
            store_int8(buffer[DATA], row * D + d, mul(load(np.float32, x, d), inverse))
