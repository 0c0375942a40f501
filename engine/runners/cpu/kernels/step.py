"""The forward pass of a decode step: a few tokens through all layers, in one compiled function.

Tokens are independent. Each may belong to any sequence, sees its own keys, and gets the same bits in any batch. So a
batch of unequal lengths is a list of tokens, and a row of it equals the row alone.

Shape letters: n tokens, E hidden size, H query heads, K key-value heads, D head dim, L layers.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .attention import join, part
from .blocks import project_any, rounded
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
from .simd import size_of
from .team import COMPLETE, STATE, assemble, new_team, take, wait

QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(7)  # linear layers of a decoder layer
SHARED = 5  # pieces of work of a layer whose threads take what is left: four projections and attention
_ROWS = 16  # that a thread takes at least: whole vectors
TOKEN, BAND, START, COUNT, SHIFT = range(5)  # of a part of attention


@njit(parallel=True, cache=True)
def step(
    shape,
    numbers,
    weights,
    cache,
    linears,
    norms,
    groups,
    x,
    rotations,
    parts,
    firsts,
    scales,
    places,
    buffers,
    head,
    logits,
    threads,
):
    """Run n tokens, write their keys and values, and compute the logits of the last m.

    Args:
        shape: int64: H, K, D, activation, whether queries and keys are normed over all heads at once, the first rotated
            number of a head, the count of rotated numbers, whether pairs are neighbours.
        numbers: float32: the epsilon of the norms, and the soft-cap of the scores or 0.
        weights, cache: the number types of the weights and of the cache; np.uint8 for weights in blocks.
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
    H, K, D = shape[0], shape[1], shape[2]
    n, inner = len(x), linears[0, GATE, 3]
    count = 0
    for group in range(len(firsts)):
        count = max(count, firsts[group, n] - firsts[group, 0])
    hidden = np.empty(x.shape, np.float32)
    qkv, mixed = np.empty((n, (H + 2 * K) * D), np.float32), np.empty((n, H * D), np.float32)
    gate_up, gated = np.empty((n, 2 * inner), np.float32), np.empty((n, inner), np.float32)
    queries = np.empty((rotations[0].shape[1], n, H, D), np.float32)
    outs, peaks = np.empty((count, H, D), np.float32), np.empty((count, H), np.float32)
    sums = np.empty((count, H), np.float32)
    team = new_team(SHARED * len(linears) + 1)
    turns, key_turns = rotations
    for thread in prange(threads):
        if assemble(team, threads):
            _run(
                thread,
                threads,
                team,
                shape,
                numbers,
                weights,
                cache,
                linears,
                norms,
                groups,
                x,
                turns,
                key_turns,
                parts,
                firsts,
                scales,
                places,
                buffers,
                head,
                logits,
                (hidden, qkv, queries, outs, peaks, sums, mixed, gate_up, gated),
            )
    return team[STATE] == COMPLETE


@njit(cache=True)
def _run(
    thread,
    threads,
    team,
    shape,
    numbers,
    weights,
    cache,
    linears,
    norms,
    groups,
    embeddings,
    turns,
    key_turns,
    parts,
    firsts,
    scales,
    places,
    buffers,
    head,
    logits,
    shared,
):
    """The share of one thread. It has its own copy of the hidden states; `shared` are results that all threads read.

    Between two barriers threads write different numbers of a result, or one thread reads what only it has written.
    """
    hidden, qkv, queries, outs, peaks, sums, mixed, gate_up, gated = shared
    n, L, m = len(embeddings), len(linears), len(logits)
    x, normed = embeddings.copy(), np.empty_like(embeddings)
    first, stop = share(thread, threads, n)
    for i in range(L):
        layer, norm, group, work = linears[i], norms[i], groups[i], SHARED * i
        rms_norm(x, norm[BEFORE_ATTENTION], numbers[0], normed)
        project(weights, layer[QUERY:OUT], normed, qkv, team, work, threads)
        wait(team, threads)
        norm_heads(shape, norm, numbers[0], qkv[first:stop])
        rotate_queries(shape, qkv, turns[group], scales[group], queries, first, stop)
        write_keys_values(shape, cache, qkv, key_turns[group], places, buffers[i], first, stop)
        wait(team, threads)
        _attend(
            shape,
            numbers[1],
            cache,
            queries,
            parts,
            firsts[group],
            buffers[i],
            outs,
            peaks,
            sums,
            team,
            work + 1,
            threads,
        )
        wait(team, threads)
        _join(shape, firsts[group], outs, peaks, sums, mixed, thread, threads)
        wait(team, threads)
        project(weights, layer[OUT:GATE], mixed, hidden, team, work + 2, threads)
        wait(team, threads)
        add_to_residual(hidden, norm[AFTER_ATTENTION], numbers[0], x, normed)
        rms_norm(x, norm[BEFORE_MLP], numbers[0], normed)
        _project_gated(weights, layer[GATE:DOWN], normed, shape[3], gate_up, gated, team, work + 3, threads)
        wait(team, threads)
        project(weights, layer[DOWN:], gated, hidden, team, work + 4, threads)
        wait(team, threads)
        add_to_residual(hidden, norm[AFTER_MLP], numbers[0], x, normed)
    if m:
        last = x[n - m :]
        rms_norm(last, norms[L, 0], numbers[0], last)
        project(weights, head, last, logits, team, SHARED * L, threads)


@njit(cache=True)
def share(thread, threads, count):
    """The tokens [first, stop) of one thread."""
    return count * thread // threads, count * (thread + 1) // threads


@njit(parallel=True, cache=True)
def touch(count):
    """A parallel region of `count` small parts. It wakes `count` threads."""
    total_ = 0
    for p in prange(count):
        total_ += p
    return total_


@njit(cache=True)
def project(kind, linears, x, out, team, work, threads):
    """What this thread takes of the rows of `out` [n, rows of all] = x [n, columns] times several linear layers.

    Args:
        linears: int64 [k, 8], as `project_any` takes them.
        work: the number of this piece of work of the team.
    """
    vectors = rounded(kind, x, linears)
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
                project_any(kind, linear, x.ctypes.data, vectors.ctypes.data, len(x), first, last, out, offset)
            offset += rows
        start, stop = take(team, work, count, _ROWS, threads)
    return vectors[0, 0]  # numba frees an array after the last line that names it


@njit(cache=True)
def _project_gated(kind, linears, x, activation, both, out, team, work, threads):
    """What this thread takes of the columns of `out` [n, inner] = act(gate x) * (up x). `both` is [n, 2 inner]."""
    vectors, inner = rounded(kind, x, linears), out.shape[1]
    start, stop = take(team, work, inner, _ROWS, threads)
    while start < stop:
        for which in range(2):
            addresses = x.ctypes.data, vectors.ctypes.data
            project_any(kind, linears[which], *addresses, len(x), start, stop, both, which * inner)
        gate(both, activation, out, start, stop)
        start, stop = take(team, work, inner, _ROWS, threads)
    return vectors[0, 0]  # as in `project`


@njit(cache=True)
def _attend(shape, softcap, kind, queries, parts, firsts, buffers, outs, peaks, sums, team, work, threads):
    """What this thread takes of the parts of attention."""
    H, K, D = shape[0], shape[1], shape[2]
    G, begin = H // K, firsts[0]
    count = firsts[len(firsts) - 1] - begin
    size = size_of(kind)
    i, stop = take(team, work, count * K, 1, threads)
    while i < stop:
        p, h = i // K, i % K
        some = parts[begin + p]
        keys, vals = buffers[some[TOKEN], KEYS], buffers[some[TOKEN], VALUES]
        key, value = h * keys[CAPACITY] + some[START], h * vals[CAPACITY] + some[START]
        part(
            kind,
            keys[DATA] + size * key * D,
            vals[DATA] + size * value * D,
            keys[SCALES] + 4 * key if keys[SCALES] else 0,
            vals[SCALES] + 4 * value if vals[SCALES] else 0,
            some[COUNT],
            some[SHIFT],
            queries[some[BAND], some[TOKEN], h * G].ctypes.data,
            G,
            shape,
            softcap,
            outs[p, h * G].ctypes.data,
            peaks[p, h * G : (h + 1) * G],
            sums[p, h * G : (h + 1) * G],
        )
        i += 1
        if i == stop:
            i, stop = take(team, work, count * K, 1, threads)


@njit(cache=True)
def _join(shape, firsts, outs, peaks, sums, mixed, thread, threads):
    """One thread's share of the heads whose parts are joined."""
    H, D = shape[0], shape[2]
    for i in range(thread, len(mixed) * H, threads):
        t, h = i // H, i % H
        join(outs, peaks, sums, firsts[t] - firsts[0], firsts[t + 1] - firsts[0], h, D, mixed[t])
