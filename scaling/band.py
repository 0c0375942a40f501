"""Bands: the keys that a query sees, and the positions at which it sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PositionMap = Callable[[Tensor], Tensor]
"""A function from integer positions to positions of the same shape, or of that shape and d/2 if rotary pairs have
positions of their own."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A range of keys for every query, with ordinary attention at mapped positions.

    Query i sees the keys start(i) <= j < stop(i) at the positions query(i) and key(j). Both borders grow with i:
    by 0 or 1 from one query to the next, and by more only where a chunk ends. The bands of a position map divide
    the keys 0..i of each query among themselves. Each key is in one band, or in none if the map evicts it.

    Args:
        name: name of the band in plots.
        start: the first key that query i sees, int64 -> int64.
        stop: the key after the last one, at most i + 1, int64 -> int64.
        query: the position of query i in the rotation, int64 [...] -> float64 [...], or [..., d/2] with a position for
            each rotary pair. It can be a fraction.
        key: the position of key j in the rotation, as `query`. Bands with the same function read the same rotated keys.
    """

    name: str
    start: PositionMap
    stop: PositionMap
    query: PositionMap
    key: PositionMap


def pair_positions(position_map: PositionMap, tokens: Tensor) -> Tensor:
    """The positions of `tokens` for the rotary pairs, [..., d/2], or [..., 1] if all pairs have the same."""
    positions = position_map(tokens)
    return positions if positions.dim() > tokens.dim() else positions[..., None]


def same(x: Tensor) -> Tensor:
    """The position itself."""
    return x.double()


def zero(x: Tensor) -> Tensor:
    """Position 0."""
    return torch.zeros_like(x)


def after(x: Tensor) -> Tensor:
    """The next position."""
    return x + 1


PLAIN = Band(name="all", start=zero, stop=after, query=same, key=same)
"""The only band of a model without a position map."""


def newest(window: int) -> Band:
    """The `window` newest keys at their own distance, the query's own included: a layer with a sliding window."""
    return Band(name="window", start=lambda i: (i - window + 1).clamp(min=0), stop=after, query=same, key=same)


def near_and_far(window: int, query: PositionMap, key: PositionMap) -> tuple[Band, Band]:
    """Keys nearer than `window` at their own distance; keys at `window` or farther at the given positions."""

    near = dataclasses.replace(newest(window), name="near")
    return near, Band(name="far", start=zero, stop=near.start, query=query, key=key)


_FAR = 1 << 40  # tokens; a query there sees more keys in a wide band than in any window


def stored_key_map(bands: Sequence[Band]) -> PositionMap:
    """The key map by which a cache rotates the keys that it holds: that of the bands that see most keys of a long text.

    Bands with another key map rotate these keys again when they read them.
    """
    query, counts = torch.tensor([_FAR]), dict.fromkeys((band.key for band in bands), 0)
    for band in bands:
        counts[band.key] += max(0, int(band.stop(query)) - max(0, int(band.start(query))))
    return max(counts, key=counts.__getitem__)
