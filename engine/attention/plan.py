"""The plan of one attention call under a scaler: segments of queries with their bands, frequencies and angles."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...scaling.band import Band, PositionMap, pair_positions, zero
from ...scaling.rope import Frequencies, Scaler
from ..rotary_site import RotarySite
from .blocks import Block, blocks
from .rotation import Angles, angles
from .rows import KeyRun


@dataclass
class Segment:
    """Consecutive queries [start, stop) of a run that share their frequencies and bands.

    A segment does not depend on the layer. It is made once for a call, and all layers share it.

    Args:
        length: tokens that the frequencies and bands are for; None if they do not depend on the length.
        first: the position of the run's key 0.
        offset: the index of the run's query 0 among its keys.
        temperature: the factor on the logits of every query, float64 [n], or None.
        stored: the positions to which the given keys are rotated already; by default they are un-rotated.
    """

    scaler: Scaler
    start: int
    stop: int
    length: int | None
    first: int
    offset: int
    bands: tuple[Band, ...]
    frequencies: Frequencies
    temperature: Tensor | None
    stored: PositionMap = zero
    _angles: dict[object, Angles] = field(default_factory=dict, repr=False)
    _rotation: dict[int, bool] = field(default_factory=dict, repr=False)

    @cached_property
    def blocks(self) -> list[Block]:
        """The blocks of the queries; a query and its own key have the same index."""
        return list(blocks(self.bands, self.first, self.offset + self.start, self.offset + self.stop))

    @cached_property
    def used_bands(self) -> list[int]:
        """The bands in which some query of the segment sees a key."""
        return sorted({piece.band for block in self.blocks for piece in block.pieces})

    def key_range(self, band: int) -> tuple[int, int]:
        """The keys [start, stop) that the bands with the same key map see."""
        shared = self.key_map(band)
        pieces = [p for block in self.blocks for p in block.pieces if self.key_map(p.band) == shared]
        return min(p.key_start for p in pieces), max(p.key_stop for p in pieces)

    def key_map(self, band: int) -> int:
        """The first band with the same key map. Bands with the same key map share their rotated keys."""
        return next(i for i, other in enumerate(self.bands) if other.key is self.bands[band].key)

    def query_angles(self, like: Tensor) -> Angles:
        """Angles of all queries in every used band, [bands, 1, 1, n, d/2].

        The attention factor is in them twice, for the queries and for the keys.
        """
        key = ("queries", like.dtype)
        if key not in self._angles:
            i = torch.arange(self.start, self.stop) + self.offset + self.first
            shape = len(i), len(self.frequencies.inv_freq)
            queries = [pair_positions(self.bands[band].query, i).expand(shape) for band in self.used_bands]
            positions = torch.stack(queries)[:, None, None]
            factor = self.frequencies.attention_factor**2
            self._angles[key] = angles(positions, self.frequencies.inv_freq, factor=factor, like=like)
        return self._angles[key]

    def key_angles(self, band: int, start: int, stop: int, like: Tensor) -> Angles:
        """Angles from the keys [start, stop) as they are given to those of `band`, [n, d/2]."""
        key = (band, start, stop, like.dtype)
        if key not in self._angles:
            positions = self._key_shift(band, start, stop)
            self._angles[key] = angles(positions, self.frequencies.inv_freq, like=like)
        return self._angles[key]

    def rotates(self, band: int) -> bool:
        """False if `band` reads all its keys as they are given."""
        if band not in self._rotation:
            self._rotation[band] = bool(self._key_shift(band, *self.key_range(band)).any())
        return self._rotation[band]

    def _key_shift(self, band: int, start: int, stop: int) -> Tensor:
        """How far the keys [start, stop) move from where they are given to their positions in `band`, [n, 1 or d/2]."""
        j = torch.arange(start, stop) + self.first
        return pair_positions(self.bands[band].key, j) - pair_positions(self.stored, j)


@dataclass
class Plan:
    """A scaler on the layers of one rotary site.

    Args:
        length: the fixed length of a scaler that depends on the length; None lets it grow with each sequence.
    """

    site: RotarySite
    scaler: Scaler
    length: int | None = None

    def segments(self, run: KeyRun) -> list[Segment]:
        """The queries of a run, cut where a growing length takes its next step."""
        effective, rope = self.site.configured.effective(self.scaler), self.site.configured.rope
        offset = run.key_stop - run.key_start - (run.query_stop - run.query_start)
        position, end = run.first + offset, run.first + run.key_stop - run.key_start
        segments = []
        while position < end:
            length, stop = self.length, end
            if length is None and effective.depends_on_length:
                length = effective.growing_length(position, rope)
                stop = min(end, length)
            start = position - run.first - offset
            queries = torch.arange(position, stop)
            tempered = self.scaler.member("temperature") is not None
            segments.append(
                Segment(
                    scaler=self.scaler,
                    start=start,
                    stop=start + stop - position,
                    length=length,
                    first=run.first,
                    offset=offset,
                    bands=self.site.bands(self.scaler, length),
                    frequencies=effective.frequencies(rope, length),
                    temperature=self.site.logit_factor(self.scaler, queries) if tempered else None,
                )
            )
            position = stop
        return segments
