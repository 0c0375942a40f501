"""Cuts the queries of a run into blocks, and the keys of each band into rectangles and triangles.

In a block, each border of a band either stays at the same key or moves by one key a query. So a band is a rectangle
that all queries see, and at most two triangles at its borders. Each (query, key) pair lies in exactly one of these
pieces. No mask is needed, except for a narrow band.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...scaling.band import Band
from .kernel import Sees

BLOCK = 512  # queries in the largest block
_NARROWEST = 64  # keys; a narrower band gets a mask, not blocks as small as its width


@dataclass(frozen=True)
class Piece:
    """Queries [query_start, query_stop) and keys [key_start, key_stop) of one band, as indices into the run."""

    band: int
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    sees: Sees | Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive queries [start, stop), and the pieces of their attention, largest first."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    def to(self, device: torch.device) -> Block:
        """The block with its masks on `device`."""
        moved = (
            replace(piece, sees=piece.sees.to(device)) if isinstance(piece.sees, Tensor) else piece
            for piece in self.pieces
        )
        return replace(self, pieces=tuple(moved))


def blocks(bands: Sequence[Band], first: int, start: int, stop: int) -> Iterator[Block]:
    """The blocks of the queries [start, stop) of a run whose key 0 is at position `first`."""
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
    """Yield the end of each block: a border jumps or changes its pace, or the block reaches its size.

    Step t goes from query t to query t + 1. A block of the queries a .. b - 1 has the steps a .. b - 2, which must all
    have the same paces.
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
    """The most queries of a block: at most the width of each band whose two borders move with the queries."""
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
    if s1 > s0 and s1 >= e0:  # a narrow band: no key is visible to all queries
        keys = torch.arange(s0, e1)
        yield Piece(band, start, stop, s0, e1, (key_start[:, None] <= keys) & (keys < key_stop[:, None]))
        return
    # If all queries see some key, each triangle gets one such key, so that it has a row for every query.
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
