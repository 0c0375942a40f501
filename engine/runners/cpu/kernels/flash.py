"""Attention of many queries with bfloat16 products and float32 sums, for CPUs with AVX512-BF16 or AMX.

A tile is 64 queries of heads that read the same keys. Everything about a tile is stored with one query a lane: scores
[keys, 64], weights [pairs of keys, 64], results [D, 64]. So the softmax runs down the columns, without sums across
lanes, and the rounded weights are already the operand of the second product. Both products multiply one number of a
key or value, the same for all lanes, with the vectors of a tile.

Values are stored in groups of 32 keys, [D, 32] each, so that the numbers of neighbouring keys are neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int32, int64

from .by_address import Arguments, inner
from .lanes import GROUP, ROW, TILE
from .tile_products import (
    ROWS,
    add_values,
    add_values_in_tiles,
    leave_tiles,
    may_use_amx,
    scores_in_tiles,
    scores_of,
    set_up_tiles,
)
from .tile_softmax import cap_scores, hide, scale, softmax

_BLOCK = 128  # keys whose scores are held at a time
_AT_ONCE = 1 << 17  # numbers of the keys of a head that all tiles see in turn, so that the CPU's cache holds them


def uses_amx(head_dim: int) -> bool:
    """Whether AMX multiplies here, for heads of `head_dim` numbers."""
    return head_dim % GROUP == 0 and may_use_amx()


@inner
def _tile(queries, keys, values, D, cap, amx, begin, end, lows, highs, out, peaks, sums):
    """Add the keys that the queries of a tile see to its result. Arguments as in `flash`, for one tile.

    Args:
        amx: whether AMX multiplies; D is then a multiple of 32.
        begin, end: adds only the keys in this range, which begins with a group.
    """
    first, latest, stop, earliest = lows[0], lows[0], highs[0], highs[0]
    for lane in range(1, TILE):
        first, latest = min(first, lows[lane]), max(latest, lows[lane])
        stop, earliest = max(stop, highs[lane]), min(earliest, highs[lane])
    first, stop = max(first, begin) // GROUP * GROUP, min(stop, end)
    room, factors = np.empty((1 + _BLOCK) * ROW, np.uint8), np.empty(TILE, np.float32)
    scores = (room.ctypes.data + ROW - 1) // ROW * ROW  # where lines of the CPU's cache begin
    for start in range(first, stop, _BLOCK):
        count = min(_BLOCK, stop - start)
        if amx and count >= GROUP:
            for k in range(0, count, GROUP):
                k = min(k, count - GROUP)
                scores_in_tiles(queries, keys + 2 * D * (start + k), 2 * D, D // GROUP, scores + ROW * k)
        else:
            last = keys + 2 * D * (start + count - 1)  # read again in place of keys after it
            for k in range(0, count, ROWS):
                key = keys + 2 * D * (start + k)
                second, third, fourth = min(key + 2 * D, last), min(key + 4 * D, last), min(key + 6 * D, last)
                scores_of(queries, key, second, third, fourth, D // 2, scores + ROW * k)
        padded = (count + GROUP - 1) // GROUP * GROUP
        if cap > 0:
            cap_scores(scores, padded, cap)
        if start < latest or start + padded > earliest:
            hide(scores, padded, start, lows.ctypes.data, highs.ctypes.data)
        softmax(scores, padded, peaks.ctypes.data, sums.ctypes.data, factors.ctypes.data)
        weights, value, result, step = scores, values + 2 * D * start, out.ctypes.data, 2 * D * GROUP
        if factors.min() < 1:  # no peak grows in most blocks
            scale(result, D, factors.ctypes.data)
        if amx:
            for d in range(0, D, GROUP):
                add_values_in_tiles(weights, value + 2 * GROUP * d, step, padded // GROUP, result + ROW * d)
        else:
            for d in range(0, D, ROWS):
                add_values(weights, value + 2 * GROUP * d, step, padded // 2, result + ROW * d)
    return room[0], factors[0]  # numba frees an array after the last line that names it


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
        values: the address of the bfloat16 values of the first head, [keys / 32, D, 32]; the next head is
            `value_stride` bytes on.
        cap: c in c tanh(score / c), or 0.
        lows, highs: int32 [tiles, 64]: a query sees the keys from its low to before its high. Without keys low = high.
        out: float32 [K, tiles, D, 64]: the sums of weights times values, changed in place.
        peaks: float32 [K, tiles, 64]: the largest score so far, -1e30 before the first key. Scores are powers of 2.
        sums: float32 [K, tiles, 64]: the sums of the weights 2^(score - peak) so far.
    """
    amx = uses_amx(2 * queries.shape[2])
    _ARGUMENTS.run(
        _share,
        threads,
        queries=queries,
        held=np.array([keys, key_stride, values, value_stride, amx], np.int64),
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
    keys, key_stride, values, value_stride, amx = a.held[0], a.held[1], a.held[2], a.held[3], a.held[4] != 0
    if amx:
        set_up_tiles()
    keys_seen, piece = a.highs.max(), max(_BLOCK, _AT_ONCE // D // _BLOCK * _BLOCK)
    for h in range(K):
        query, key, value = a.queries[h], keys + key_stride * h, values + value_stride * h
        for begin in range(0, keys_seen, piece):
            end = begin + piece
            for t in range((thread - h * tiles) % threads, tiles, threads):
                state = a.out[h, t], a.peaks[h, t], a.sums[h, t]
                _tile(query[t].ctypes.data, key, value, D, a.cap[0], amx, begin, end, a.lows[t], a.highs[t], *state)
    if amx:
        leave_tiles()
