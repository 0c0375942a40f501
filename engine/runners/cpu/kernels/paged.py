"""Attention of single queries over keys and values in pages, in parts of a fixed number of keys (`attention.py`).

Shape letters: n queries, H query heads, K key-value heads, G = H / K, D head dim.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int64

from .attention import join
from .by_address import Arguments, call

TOKEN, BAND, BLOCK, PLACE, COUNT, SHIFT = range(6)  # of a part


def paged(
    shape: Any,
    softcap: Any,
    kernels: Any,
    queries: Any,
    parts: Any,
    firsts: Any,
    pages: Any,
    outs: Any,
    peaks: Any,
    sums: Any,
    result: Any,
    threads: int,
) -> None:
    """Softmax attention of n queries.

    Args:
        shape: int64, as `step` takes it: H, K, D, 0, 0, the first rotated number of a head, the count of rotated
            numbers, whether pairs are neighbours.
        softcap: of the scores, or 0; float32 [1].
        kernels: as `step` takes them.
        queries: float32 [bands, n, H, D], rotated, and multiplied by the factor on the scores.
        parts: int64 [parts, 6]: query, band, page, place of the first key in the page, number of keys, and the address
            of the cosines and sines by which the band rotates these keys, float32 [keys, 2, d / 2], or 0.
        firsts: int64 [n + 1]: the first part of every query. A query has at least one part.
        pages: int64: the address of the keys of the first head in page 0, that of the values, and the steps in numbers
            from page to page and from head to head.
        outs, peaks, sums: float32 [parts, H, D], [parts, H] and [parts, H], for intermediate results.
        result: float32 [n, H * D].
    """
    arrays = {
        "shape": shape,
        "softcap": softcap,
        "kernels": kernels,
        "queries": queries,
        "parts": parts,
        "firsts": firsts,
        "pages": pages,
        "outs": outs,
        "peaks": peaks,
        "sums": sums,
        "result": result,
    }
    _ARGUMENTS.run(_attend, threads, **arrays)
    _ARGUMENTS.run(_join, threads, **arrays)


_ARGUMENTS = Arguments(
    shape=int64[::1],
    softcap=float32[::1],
    kernels=int64[::1],
    queries=float32[:, :, :, ::1],
    parts=int64[:, ::1],
    firsts=int64[::1],
    pages=int64[::1],
    outs=float32[:, :, ::1],
    peaks=float32[:, ::1],
    sums=float32[:, ::1],
    result=float32[:, ::1],
)
_arrays_at = _ARGUMENTS.arrays_at


def _attend(thread, threads, address):
    """One thread's share of the parts."""
    a = _arrays_at(address)
    H, K, D, pages, size = a.shape[0], a.shape[1], a.shape[2], a.pages, a.kernels[0]
    G = H // K
    for i in range(thread, len(a.parts) * K, threads):
        p, h = i // K, i % K
        work = a.parts[p]
        key = size * (work[BLOCK] * pages[2] + h * pages[3] + work[PLACE] * D)
        q = a.queries[work[BAND], work[TOKEN], h * G].ctypes.data
        about = work[COUNT], work[SHIFT], q, G, a.shape.ctypes.data, a.softcap.ctypes.data
        results = a.outs[p, h * G].ctypes.data, a.peaks[p, h * G :].ctypes.data, a.sums[p, h * G :].ctypes.data
        call(a.kernels[2 if work[SHIFT] else 1], (pages[0] + key, pages[1] + key, 0, 0, *about, *results))


def _join(thread, threads, address):
    """One thread's share of the heads whose parts are joined."""
    a = _arrays_at(address)
    H, D = a.shape[0], a.shape[2]
    for i in range(thread, len(a.result) * H, threads):
        t, h = i // H, i % H
        join(a.outs, a.peaks, a.sums, a.firsts[t], a.firsts[t + 1], h, D, a.result[t])
