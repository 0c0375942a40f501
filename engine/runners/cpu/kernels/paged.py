"""Attention of single queries over keys and values in pages, in parts of a fixed number of keys (`attention.py`).

Shape letters: n queries, H query heads, K key-value heads, G = H / K, D head dim.
"""

from __future__ import annotations

from numba import njit, prange

from .attention import join, part
from .simd import size_of

TOKEN, BAND, BLOCK, PLACE, COUNT, SHIFT = range(6)  # of a part


@njit(parallel=True, cache=True)
def paged(shape, softcap, kind, queries, parts, firsts, pages, outs, peaks, sums, result, threads):
    """Softmax attention of n queries.

    Args:
        shape: int64, as `step` takes it: H, K, D, 0, 0, the first rotated number of a head, the count of rotated
            numbers, whether pairs are neighbours.
        softcap: of the scores, or 0.
        kind: the number type of keys and values.
        queries: float32 [bands, n, H, D], rotated, and multiplied by the factor on the scores.
        parts: int64 [parts, 6]: query, band, page, place of the first key in the page, number of keys, and the address
            of the cosines and sines by which the band rotates these keys, float32 [keys, 2, d / 2], or 0.
        firsts: int64 [n + 1]: the first part of every query. A query has at least one part.
        pages: int64: the address of the keys of the first head in page 0, that of the values, and the steps in numbers
            from page to page and from head to head.
        outs, peaks, sums: float32 [parts, H, D], [parts, H] and [parts, H], for intermediate results.
        result: float32 [n, H * D].
    """
    H, K, D = shape[0], shape[1], shape[2]
    G, size = H // K, size_of(kind)
    for thread in prange(threads):
        for i in range(thread, len(parts) * K, threads):
            p, h = i // K, i % K
            work = parts[p]
            key = size * (work[BLOCK] * pages[2] + h * pages[3] + work[PLACE] * D)
            part(
                kind,
                pages[0] + key,
                pages[1] + key,
                0,
                0,
                work[COUNT],
                work[SHIFT],
                queries[work[BAND], work[TOKEN], h * G].ctypes.data,
                G,
                shape,
                softcap,
                outs[p, h * G].ctypes.data,
                peaks[p, h * G : (h + 1) * G],
                sums[p, h * G : (h + 1) * G],
            )
    for thread in prange(threads):
        for i in range(thread, len(result) * H, threads):
            t, h = i // H, i % H
            join(outs, peaks, sums, firsts[t], firsts[t + 1], h, D, result[t])
