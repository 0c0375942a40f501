"""A band: which keys a query sees, and at which positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PositionMap = Callable[[Tensor], Tensor]
"""Integer positions in, positions out, of the same shape."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """One part of the keys of every query: ordinary attention at mapped positions.

    Query i sees the keys start(i) <= j < stop(i) at positions query(i) and key(j). Both borders grow with i, by
    0 or 1 a step but for jumps where a chunk ends. The bands of a position map share out the keys 0..i of every
    query, each key once (a map that forgets leaves some to none), so that their parts join exactly.

    Args:
        name: what the band is called in pictures.
        start: first key that query i sees, int64 -> int64.
        stop: the key after the last one, at most i + 1, int64 -> int64.
        query: position by which query i is rotated, int64 -> float64; need not be whole.
        key: position by which key j is rotated, int64 -> float64. Bands with the same function share their
            rotated keys.
    """

    name: str
    start: PositionMap
    stop: PositionMap
    query: PositionMap
    key: PositionMap


def same(x: Tensor) -> Tensor:
    """The position itself."""
    return x.double()


def zero(x: Tensor) -> Tensor:
    """Position 0."""
    return torch.zeros_like(x)


def after(x: Tensor) -> Tensor:
    """The position after."""
    return x + 1


PLAIN = Band(name="all", start=zero, stop=after, query=same, key=same)
"""The one band of a model without a position map."""


def near_and_far(window: int, query: PositionMap, key: PositionMap) -> tuple[Band, Band]:
    """Keys nearer than `window` as they are; those at `window` or farther at the given positions."""

    def border(i: Tensor) -> Tensor:
        return (i - window + 1).clamp(min=0)

    near = Band(name="near", start=border, stop=after, query=same, key=same)
    far = Band(name="far", start=zero, stop=border, query=query, key=key)
    return near, far
