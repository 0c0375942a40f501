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
from .rotation import Angles, Copies, angles
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
        inv_freq: the frequencies on every device; by default they are copied there for this segment.
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
    inv_freq: Copies | None = None
    _temperature: Copies | None = field(default=None, repr=False)
    _blocks: dict[torch.device, list[Block]] = field(default_factory=dict, repr=False)
    _angles: dict[object, Angles] = field(default_factory=dict, repr=False)
    _rotation: dict[int, bool] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.inv_freq = self.inv_freq or Copies(self.frequencies.inv_freq)
        self._temperature = None if self.temperature is None else Copies(self.temperature)

    def temperature_on(self, device: torch.device) -> Tensor | None:
        """`temperature` on a device."""
        return None if self._temperature is None else self._temperature.on(device)

    def blocks_on(self, device: torch.device) -> list[Block]:
        """`blocks` with their masks on a device."""
        if device not in self._blocks:
            self._blocks[device] = [block.to(device) for block in self.blocks]
        return self._blocks[device]

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
        key = ("queries", like.dtype, like.device)
        if key not in self._angles:
            first = self.offset + self.first
            i = torch.arange(first + self.start, first + self.stop, device=like.device)
            shape = len(i), len(self.frequencies.inv_freq)
            queries = [pair_positions(self.bands[band].query, i).expand(shape) for band in self.used_bands]
            positions = torch.stack(queries)[:, None, None]
            factor = self.frequencies.attention_factor**2
            self._angles[key] = self._angles_at(positions, factor, like)
        return self._angles[key]

    def key_angles(self, band: int, start: int, stop: int, like: Tensor) -> Angles:
        """Angles from the keys [start, stop) as they are given to those of `band`, [n, d/2]."""
        key = (band, start, stop, like.dtype, like.device)
        if key not in self._angles:
            positions = self._key_shift(band, start, stop, like.device)
            self._angles[key] = self._angles_at(positions, 1.0, like)
        return self._angles[key]

    def _angles_at(self, positions: Tensor, factor: float, like: Tensor) -> Angles:
        assert self.inv_freq is not None
        return angles(positions, self.inv_freq.on(positions.device), factor=factor, like=like)

    def rotates(self, band: int) -> bool:
        """False if `band` reads all its keys as they are given."""
        if band not in self._rotation:
            self._rotation[band] = bool(self._key_shift(band, *self.key_range(band)).any())
        return self._rotation[band]

    def _key_shift(self, band: int, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """How far the keys [start, stop) move from where they are given to their positions in `band`, [n, 1 or d/2]."""
        j = torch.arange(self.first + start, self.first + stop, device=device)
        return pair_positions(self.bands[band].key, j) - pair_positions(self.stored, j)


@dataclass(eq=False)
class Plan:
    """A scaler on layers of one rotary site.

    Args:
        length: the fixed length of a scaler that depends on the length; None lets it grow with each sequence.
    """

    site: RotarySite
    scaler: Scaler
    length: int | None = None
    _frequencies: dict[int | None, tuple[Frequencies, Copies]] = field(default_factory=dict, repr=False)

    def segments(self, run: KeyRun, device: torch.device | None = None) -> list[Segment]:
        """The queries of a run, cut where a growing length takes its next step.

        Args:
            device: where attention runs. What depends on the positions is computed there.
        """
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
            queries = torch.arange(position, stop, device=device)
            frequencies, inv_freq = self._frequencies_for(length)
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
                    frequencies=frequencies,
                    inv_freq=inv_freq,
                    temperature=self.site.logit_factor(self.scaler, queries) if tempered else None,
                )
            )
            position = stop
        return segments

    def _frequencies_for(self, length: int | None) -> tuple[Frequencies, Copies]:
        """The frequencies for a length, and their copies. Those of the last length are kept."""
        if length not in self._frequencies:
            effective, rope = self.site.configured.effective(self.scaler), self.site.configured.rope
            frequencies = effective.frequencies(rope, length)
            self._frequencies = {length: (frequencies, Copies(frequencies.inv_freq))}
        return self._frequencies[length]
