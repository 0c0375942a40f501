"""How the keys of every band fall into rectangles: the plan of banded attention.

Queries are cut into blocks in which the borders of every band stand still or move by one key a query. Inside a
block a band is then a rectangle that all queries see, and up to two triangles at its borders; each (query, key)
pair lies in exactly one of them, and nothing is masked that need not be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...scaling.band import Band
from .kernel import Sees

BLOCK = 512  # most queries a block
_NARROWEST = 64  # a band narrower than this is masked rather than cut into blocks of its width


@dataclass(frozen=True)
class Piece:
    """Queries [query_start, query_stop) on keys [key_start, key_stop) of one band; indices into the run."""

    band: int
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    sees: Sees | Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive queries [start, stop) with the pieces that make up their attention, largest first."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def blocks(bands: Sequence[Band], first: int, start: int, stop: int) -> Iterator[Block]:
    """The blocks of the queries [start, stop) of a run, whose key 0 is at position `first`."""
    positions = torch.arange(first + start, first + stop)
    borders = []
    for band in bands:
        key_start = (band.start(positions) - first).clamp(min=0)
        borders.append((key_start, torch.maximum(band.stop(positions) - first, key_start)))
    a = 0
    for b in _cuts(borders, stop - start):
        pieces: list[Piece] = []
        for index, (key_start, key_stop) in enumerate(borders):
            pieces += _pieces(index, start + a, key_start[a:b], key_stop[a:b])
        pieces.sort(key=lambda piece: piece.query_start - piece.query_stop)
        yield Block(start + a, start + b, tuple(pieces))
        a = b


def _cuts(borders: list[tuple[Tensor, Tensor]], count: int) -> Iterator[int]:
    """Where blocks end: where a border jumps or changes its pace, and at the block size.

    Step t leads from query t to t + 1; a block of the queries a .. b - 1 contains the steps a .. b - 2, which must be
    alike.
    """
    paces = torch.stack([torch.diff(border) for pair in borders for border in pair])  # [2 * bands, count - 1]
    jumps = ((paces < 0) | (paces > 1)).any(0)
    changes = jumps.clone()
    changes[1:] |= (paces[:, 1:] != paces[:, :-1]).any(0)
    breaks = torch.nonzero(changes)[:, 0].tolist()
    start = 0
    for step in [*breaks, count - 1]:
        if step < start or (step == start and step < count - 1 and not jumps[step]):
            continue  # the first step of a block may differ from the one before it
        while start <= step:
            start = min(start + _size(borders, paces, start), step + 1)
            yield start


def _size(borders: list[tuple[Tensor, Tensor]], paces: Tensor, start: int) -> int:
    """Most queries of a block: no more than the width of a band that slides along with them."""
    size = BLOCK
    if start < paces.shape[1]:
        for index, (key_start, key_stop) in enumerate(borders):
            width = int(key_stop[start] - key_start[start])
            if paces[2 * index, start] and paces[2 * index + 1, start] and width >= _NARROWEST:
                size = min(size, width)
    return size


def _pieces(band: int, start: int, key_start: Tensor, key_stop: Tensor) -> Iterator[Piece]:
    count = len(key_start)
    stop = start + count
    s0, s1, e0, e1 = int(key_start[0]), int(key_start[-1]), int(key_stop[0]), int(key_stop[-1])
    if e1 <= s0:
        return
    if s1 > s0 and s1 >= e0:  # a narrow band: no key is seen by all
        keys = torch.arange(s0, e1)
        yield Piece(band, start, stop, s0, e1, (key_start[:, None] <= keys) & (keys < key_stop[:, None]))
        return
    # A triangle takes in one key that all queries see, where there is one: it then has a row for every query.
    inner_start, inner_stop = s1, e0
    if e1 > e0:
        shared = inner_stop > inner_start
        inner_stop -= shared
        yield Piece(band, start + (not shared), stop, inner_stop, e1, "lower")
    if s1 > s0:
        shared = inner_stop > inner_start
        inner_start += shared
        yield Piece(band, start, stop - (not shared), s0, inner_start, "upper")
    if inner_stop > inner_start:
        yield Piece(band, start, stop, inner_start, inner_stop, "all")
