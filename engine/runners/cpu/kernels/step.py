"""The forward pass of a decode step: a few tokens through all layers, in one compiled function.

Tokens are independent. Each may belong to any sequence, sees its own keys, and gets the same bits in any batch. So a
batch of unequal lengths is a list of tokens, and a row of it equals the row alone.

Shape letters: n tokens, E hidden size, H query heads, K key-value heads, D head dim, L layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int16, int64

from .attention import join
from .blocks import project_any, room, rounded
from .by_address import Arguments, call, inner
from .elementwise import (
    AFTER_ATTENTION,
    AFTER_MLP,
    BEFORE_ATTENTION,
    BEFORE_MLP,
    CAPACITY,
    DATA,
    KEYS,
    SCALES,
    VALUES,
    add_to_residual,
    gate,
    norm_heads,
    rms_norm,
    rotate_queries,
    write_keys_values,
)
from .team import COMPLETE, STATE, assemble, new_team, take, wait

QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(7)  # linear layers of a decoder layer
SHARED = 5  # pieces of work of a layer whose threads take what is left: four projections and attention
_ROWS = 16  # that a thread takes at least: whole vectors
TOKEN, BAND, START, COUNT, SHIFT = range(5)  # of a part of attention


def step(
    shape: Any,
    numbers: Any,
    kernels: Any,
    linears: Any,
    norms: Any,
    groups: Any,
    x: Any,
    rotations: Any,
    parts: Any,
    firsts: Any,
    scales: Any,
    places: Any,
    buffers: Any,
    head: Any,
    logits: Any,
    threads: int,
) -> bool:
    """Run n tokens, write their keys and values, and compute the logits of the last m.

    Args:
        shape: int64: H, K, D, activation, whether queries and keys are normed over all heads at once, the first rotated
            number of a head, the count of rotated numbers, whether pairs are neighbours.
        numbers: float32: the epsilon of the norms, and the soft-cap of the scores or 0.
        kernels: int64: the bytes of a number of the cache, and the addresses of the kernels of `attention.part` that
            read keys as they are and that rotate them; 0 if no part rotates them.
        linears: int64 [L, 7, 8], as `project_any` takes them.
        norms: int64 [L + 1, 6]: addresses of float32 weights, 0 for none. [L, 0] is the final norm.
        groups: int64 [L]: the row of `rotations`, `firsts` and `scales` for each layer.
        x: float32 [n, E], the embeddings.
        rotations: cosines and sines, float32: for queries [groups, bands, n, 2, d / 2], for keys [groups, n, 2, d / 2].
        parts: int64 [parts, 5] of attention: token, band, first key, number of keys, and the address of the cosines and
            sines by which the band rotates these keys, float32 [keys, 2, d / 2]; 0 if it reads them as they are.
        firsts: int64 [groups, n + 1]: the first part of every token. A token has at least one part.
        scales: float32 [groups, n]: the factor on the scores of every token.
        places: int64 [n]: the index of each token's key in its cache.
        buffers: int64 [L, n, 2, 3] of keys and of values: the address, the address of the scales of an int8 cache, and
            the capacity of a head in keys.
        head: int64 [1, 8], the linear layer from hidden states to logits.
        logits: float32 [m, V], the result.
        threads: the number of threads that work together.

    Returns:
        False if fewer than `threads` threads came. Then nothing was done.
    """
    H, K, D = shape[:3]
    n, inner, rounds = len(x), linears[0, GATE, 3], max(linears[:, :, 7].max(), head[0, 7])
    count = (firsts[:, n] - firsts[:, 0]).max()
    turns, key_turns = rotations
    team = new_team(SHARED * len(linears) + 1)
    _ARGUMENTS.run(
        _share,
        threads,
        team=team,
        shape=shape,
        numbers=numbers,
        kernels=kernels,
        linears=linears,
        norms=norms,
        groups=groups,
        x=np.repeat(x[None], threads, 0),
        normed=np.empty((threads, *x.shape), np.float32),
        vectors=np.empty((threads, room(n, max(x.shape[1], H * D, inner), rounds)), np.int16),
        turns=turns,
        key_turns=key_turns,
        parts=parts,
        firsts=firsts,
        scales=scales,
        places=places,
        buffers=buffers,
        head=head,
        logits=logits,
        hidden=np.empty_like(x),
        qkv=np.empty((n, (H + 2 * K) * D), np.float32),
        queries=np.empty((turns.shape[1], n, H, D), np.float32),
        outs=np.empty((count, H, D), np.float32),
        peaks=np.empty((count, H), np.float32),
        sums=np.empty((count, H), np.float32),
        mixed=np.empty((n, H * D), np.float32),
        gate_up=np.empty((n, 2 * inner), np.float32),
        gated=np.empty((n, inner), np.float32),
    )
    return bool(team[STATE] == COMPLETE)


_ARGUMENTS = Arguments(
    team=int64[::1],
    shape=int64[::1],
    numbers=float32[::1],
    kernels=int64[::1],
    linears=int64[:, :, ::1],
    norms=int64[:, ::1],
    groups=int64[::1],
    x=float32[:, :, ::1],
    normed=float32[:, :, ::1],
    vectors=int16[:, ::1],
    turns=float32[:, :, :, :, ::1],
    key_turns=float32[:, :, :, ::1],
    parts=int64[:, ::1],
    firsts=int64[:, ::1],
    scales=float32[:, ::1],
    places=int64[::1],
    buffers=int64[:, :, :, ::1],
    head=int64[:, ::1],
    logits=float32[:, ::1],
    hidden=float32[:, ::1],
    qkv=float32[:, ::1],
    queries=float32[:, :, :, ::1],
    outs=float32[:, :, ::1],
    peaks=float32[:, ::1],
    sums=float32[:, ::1],
    mixed=float32[:, ::1],
    gate_up=float32[:, ::1],
    gated=float32[:, ::1],
)
_arrays_at = _ARGUMENTS.arrays_at


def _share(thread, threads, address):
    """The share of one thread. It has its own copy of the hidden states; all threads read the other results.

    Between two barriers threads write different numbers of a result, or one thread reads what only it has written.
    """
    a = _arrays_at(address)
    team, shape, numbers, kernels, linears, norms = a.team, a.shape, a.numbers, a.kernels, a.linears, a.norms
    hidden, qkv, queries, outs, peaks, sums = a.hidden, a.qkv, a.queries, a.outs, a.peaks, a.sums
    mixed, gate_up, gated, logits = a.mixed, a.gate_up, a.gated, a.logits
    if not assemble(team, threads):
        return
    x, normed, vectors = a.x[thread], a.normed[thread], a.vectors[thread].ctypes.data
    n, L, m = len(x), len(linears), len(logits)
    first, stop = share(thread, threads, n)
    for i in range(L):
        layer, norm, group, work = linears[i], norms[i], a.groups[i], SHARED * i
        rms_norm(x, norm[BEFORE_ATTENTION], numbers[0], normed)
        project(layer[QUERY:OUT], normed, qkv, vectors, team, work, threads)
        wait(team, threads)
        norm_heads(shape, norm, numbers[0], qkv[first:stop])
        rotate_queries(shape, qkv, a.turns[group], a.scales[group], queries, first, stop)
        write_keys_values(shape, kernels[0], qkv, a.key_turns[group], a.places, a.buffers[i], first, stop)
        wait(team, threads)
        seen = a.parts, a.firsts[group], a.buffers[i]
        _attend(shape, numbers[1:].ctypes.data, kernels, queries, seen, (outs, peaks, sums), team, work + 1, threads)
        wait(team, threads)
        _join(shape, a.firsts[group], outs, peaks, sums, mixed, thread, threads)
        wait(team, threads)
        project(layer[OUT:GATE], mixed, hidden, vectors, team, work + 2, threads)
        wait(team, threads)
        add_to_residual(hidden, norm[AFTER_ATTENTION], numbers[0], x, normed)
        rms_norm(x, norm[BEFORE_MLP], numbers[0], normed)
        _project_gated(layer[GATE:DOWN], normed, shape[3], gate_up, gated, vectors, team, work + 3, threads)
        wait(team, threads)
        project(layer[DOWN:], gated, hidden, vectors, team, work + 4, threads)
        wait(team, threads)
        add_to_residual(hidden, norm[AFTER_MLP], numbers[0], x, normed)
    if m:
        last = x[n - m :]
        rms_norm(last, norms[L, 0], numbers[0], last)
        project(a.head, last, logits, vectors, team, SHARED * L, threads)


@inner
def share(thread, threads, count):
    """The tokens [first, stop) of one thread."""
    return count * thread // threads, count * (thread + 1) // threads


@inner
def project(linears, x, out, vectors, team, work, threads):
    """What this thread takes of the rows of `out` [n, rows of all] = x [n, columns] times several linear layers.

    Args:
        linears: int64 [k, 8], as `project_any` takes them.
        vectors: the address of `room` for rounded vectors, of this thread.
        work: the number of this piece of work of the team.
    """
    rounded(x, linears, vectors)
    count = 0
    for linear in linears:
        count += linear[3]
    start, stop = take(team, work, count, _ROWS, threads)
    while start < stop:
        offset = 0
        for linear in linears:
            rows = linear[3]
            first, last = max(start - offset, 0), min(stop - offset, rows)
            if first < last:
                project_any(linear, x.ctypes.data, vectors, len(x), first, last, out, offset)
            offset += rows
        start, stop = take(team, work, count, _ROWS, threads)


@inner
def _project_gated(linears, x, activation, both, out, vectors, team, work, threads):
    """What this thread takes of the columns of `out` [n, inner] = act(gate x) * (up x). `both` is [n, 2 inner]."""
    rounded(x, linears, vectors)
    inner_size = out.shape[1]
    start, stop = take(team, work, inner_size, _ROWS, threads)
    while start < stop:
        for which in range(2):
            project_any(linears[which], x.ctypes.data, vectors, len(x), start, stop, both, which * inner_size)
        gate(both, activation, out, start, stop)
        start, stop = take(team, work, inner_size, _ROWS, threads)


@inner
def _attend(shape, softcap, kernels, queries, seen, results, team, work, threads):
    """What this thread takes of the parts of attention. `softcap` is an address."""
    (parts, firsts, buffers), (outs, peaks, sums) = seen, results
    H, K, D = shape[0], shape[1], shape[2]
    G, begin, size = H // K, firsts[0], kernels[0]
    count = firsts[len(firsts) - 1] - begin
    i, stop = take(team, work, count * K, 1, threads)
    while i < stop:
        p, h = i // K, i % K
        some = parts[begin + p]
        keys, vals = buffers[some[TOKEN], KEYS], buffers[some[TOKEN], VALUES]
        key, value = h * keys[CAPACITY] + some[START], h * vals[CAPACITY] + some[START]
        scales = keys[SCALES] + 4 * key if keys[SCALES] else 0, vals[SCALES] + 4 * value if vals[SCALES] else 0
        data = keys[DATA] + size * key * D, vals[DATA] + size * value * D
        q = queries[some[BAND], some[TOKEN], h * G].ctypes.data
        out = outs[p, h * G].ctypes.data, peaks[p, h * G :].ctypes.data, sums[p, h * G :].ctypes.data
        call(
            kernels[2 if some[SHIFT] else 1],
            (*data, *scales, some[COUNT], some[SHIFT], q, G, shape.ctypes.data, softcap, *out),
        )
        i += 1
        if i == stop:
            i, stop = take(team, work, count * K, 1, threads)


@inner
def _join(shape, firsts, outs, peaks, sums, mixed, thread, threads):
    """One thread's share of the heads whose parts are joined."""
    H, D = shape[0], shape[2]
    for i in range(thread, len(mixed) * H, threads):
        t, h = i // H, i % H
        join(outs, peaks, sums, firsts[t] - firsts[0], firsts[t + 1] - firsts[0], h, D, mixed[t])
