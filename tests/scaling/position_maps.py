"""Every position map with the literal distance of each query and key, and the distances of its bands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from geometries import trained_on
from hypothesis import strategies as st

from ropewalk.scaling import (
    DPE,
    DualChunk,
    JetLong,
    LeakyReRoPE,
    ReRoPE,
    RopeSpec,
    Scaler,
    SelfExtend,
    SelfLogistic,
    SinkWindow,
    String,
)
from ropewalk.scaling.band import Band, PositionMap

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Draw = st.DrawFn


@dataclass(frozen=True, kw_only=True)
class Case:
    """A map, the trained length, the number of tokens, and the distance of query i and key j (None: evicted)."""

    scaler: Scaler
    trained: int
    n: int
    distance: Callable[[int, int], float | None]
    length: int | None = None
    chunk: int | None = None  # borders can jump where a chunk ends
    pair: int = 0  # the rotary pair whose distances are given

    @property
    def rope(self) -> RopeSpec:
        return trained_on(self.trained)


@st.composite
def rerope(draw: Draw) -> Case:
    trained, n = draw(st.integers(2, 40)), draw(st.integers(1, 80))
    w = draw(st.integers(1, trained - 1))

    def distance(i: int, j: int) -> float:
        return i - j if i - j < w else w

    return Case(scaler=ReRoPE(window=w), trained=trained, n=n, distance=distance)


@st.composite
def leaky(draw: Draw) -> Case:
    trained, n = draw(st.integers(2, 40)), draw(st.integers(1, 80))
    w, k = draw(st.integers(1, trained - 1)), draw(st.integers(4, 40)) / 4  # quarters: (L - w) k is exact

    def distance(i: int, j: int) -> float:
        return i - j if i - j < w else (w + (i - w) / k) - j / k

    return Case(scaler=LeakyReRoPE(window=w, k=k), trained=trained, n=n, distance=distance)


@st.composite
def self_extend(draw: Draw) -> Case:
    trained, n = draw(st.integers(2, 40)), draw(st.integers(1, 80))
    W, G = draw(st.integers(1, trained - 1)), draw(st.integers(1, 9))

    def distance(i: int, j: int) -> float:
        return i - j if i - j < W else (i // G + W - W // G) - j // G

    return Case(scaler=SelfExtend(group=G, window=W), trained=trained, n=n, distance=distance)


@st.composite
def dpe(draw: Draw) -> Case:
    """Four rotary pairs."""
    trained, n, pair = draw(st.integers(2, 40)), draw(st.integers(1, 80)), draw(st.integers(0, 3))
    W, blocks = draw(st.integers(1, trained - 1)), draw(st.sampled_from([1, 2, 4]))
    groups = tuple(draw(st.lists(st.integers(1, 9), min_size=blocks, max_size=blocks)))
    G = [G for G in groups for _ in range(4 // blocks)][pair]

    def distance(i: int, j: int) -> float:
        return i - j if i - j < W else (i // G + W - W // G) - j // G

    return Case(scaler=DPE(groups=groups, window=W), trained=trained, n=n, distance=distance, pair=pair)


@st.composite
def self_logistic(draw: Draw) -> Case:
    trained, n = draw(st.integers(2, 40)), draw(st.integers(1, 80))
    W, r, C = draw(st.integers(1, trained - 1)), draw(st.floats(0.01, 3)), draw(st.integers(2, 12))
    group_of: list[int] = []  # written down token by token
    k = 0
    while len(group_of) < n:
        growth = math.exp(r * k)
        group_of += [k] * min(C - 1, math.floor(C * growth / (C - 1 + growth)))
        k += 1

    def distance(i: int, j: int) -> float:
        return i - j if i - j < W else W + group_of[i - W] - group_of[j]

    return Case(scaler=SelfLogistic(window=W, rate=r, capacity=C), trained=trained, n=n, distance=distance)


@st.composite
def dual_chunk(draw: Draw) -> Case:
    trained, n = draw(st.integers(8, 60)), draw(st.integers(1, 80))
    if draw(st.booleans()):
        c, w = 3 * trained // 4, trained // 8
        scaler = DualChunk()
    else:
        c = draw(st.integers(2, trained - 1))
        w = draw(st.integers(1, c // 2))
        scaler = DualChunk(chunk=c, window=w)
    t = c - w

    def distance(i: int, j: int) -> float:
        if i // t == j // t:
            return i % t - j % t
        if i // t == j // t + 1:
            return min(i % t + t, c) - j % t
        return c - j % t

    return Case(scaler=scaler, trained=trained, n=n, distance=distance, chunk=t)


@st.composite
def string(draw: Draw) -> Case:
    trained, n = draw(st.integers(6, 40)), draw(st.integers(1, 80))
    S = draw(st.none() | st.integers(1, trained - 1))
    shift = trained // 3 if S is None else S
    W = draw(st.integers(1, shift))

    def distance(i: int, j: int) -> float:
        return i - j if i - j < shift else (i - shift + W) - j

    return Case(scaler=String(shift=S, window=W), trained=trained, n=n, distance=distance)


@st.composite
def jet_long(draw: Draw) -> Case:
    trained, n = draw(st.integers(2, 40)), draw(st.integers(1, 80))
    near, length = draw(st.integers(1, trained - 1)), n + draw(st.integers(0, 80))
    G = next(g for g in range(1, length + 2) if g * trained >= length)

    def distance(i: int, j: int) -> float:
        return i - j if i - j < near else i // G - j // G

    return Case(scaler=JetLong(near=near), trained=trained, n=n, distance=distance, length=length)


@st.composite
def sink_window(draw: Draw) -> Case:
    trained, n = draw(st.integers(2, 40)), draw(st.integers(1, 60))
    sinks = draw(st.integers(1, trained - 1))
    window = draw(st.integers(1, trained - sinks))

    def distance(i: int, j: int) -> float | None:
        cache = [key for key in range(i + 1) if key < sinks or key > i - window]
        return cache.index(i) - cache.index(j) if j in cache else None

    return Case(scaler=SinkWindow(window=window, sinks=sinks), trained=trained, n=n, distance=distance)


MAPS: dict[str, st.SearchStrategy[Case]] = {
    "rerope": rerope(),
    "leaky-rerope": leaky(),
    "self-extend": self_extend(),
    "dpe": dpe(),
    "self-logistic": self_logistic(),
    "dual-chunk": dual_chunk(),
    "string": string(),
    "jet-long": jet_long(),
    "sink-window": sink_window(),
}


def at(position_map: PositionMap, tokens: torch.Tensor, pair: int) -> torch.Tensor:
    """The positions of one rotary pair."""
    positions = position_map(tokens)
    return positions if positions.shape == tokens.shape else positions[..., pair]


def seen(bands: tuple[Band, ...], n: int, pair: int = 0) -> tuple[Matrix, Matrix]:
    """The distance of query i (row) and key j (column), NaN without a band; and the number of bands with both."""
    j = torch.arange(n)
    distance, count = np.full((n, n), np.nan), np.zeros((n, n))
    for band in bands:
        inside = ((j >= band.start(j)[:, None]) & (j < band.stop(j)[:, None])).numpy()
        between = (at(band.query, j, pair)[:, None] - at(band.key, j, pair)).numpy()
        distance[inside], count[inside] = between[inside], count[inside] + 1
    return distance, count


def plain(n: int) -> Matrix:
    """i - j, NaN above the diagonal."""
    i = np.arange(n, dtype=np.float64)
    return np.where(i[:, None] >= i, i[:, None] - i, np.nan)


def largest(scaler: Scaler, trained: int, n: int, pair: int = 0) -> float:
    """The largest distance in a text of n tokens."""
    return float(np.nanmax(seen(scaler.bands(trained_on(trained), n), n, pair)[0]))
