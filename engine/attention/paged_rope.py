"""A scaler on layers whose keys lie in pages: its bands, its angles, and the form of the stored keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...scaling.band import Band, newest, pair_positions, stored_key_map
from ...scaling.named_scaler import NamedScaler
from ...scaling.rope import Frequencies
from .plan import Segment
from .rotation import Angles, Layout, angles, cos_sin


@dataclass(frozen=True, eq=False)
class PagedRope:
    """A named scaler on layers with the same rotary pairs.

    Args:
        layout: the places of the rotary pairs.
        window: the keys that a query sees, itself included; None for all. Position maps and temperatures do not change
            layers with a window.
    """

    named: NamedScaler
    layout: Layout
    window: int | None = None

    @cached_property
    def bands(self) -> tuple[Band, ...]:
        """The bands, which are the same for texts of every length."""
        if self.window is not None:
            return (newest(self.window),)
        return self.named.configured.bands(self.named.scaler, self.named.length)

    @cached_property
    def frequencies(self) -> Frequencies:
        """The frequencies. Queries have the attention factor twice, and keys not."""
        return self.named.frequencies if self.window is None else self.named.window_frequencies

    def key_angles(self, positions: Tensor, like: Tensor) -> Angles:
        """Angles of stored keys at `positions`, [n, d/2]."""
        return angles(pair_positions(stored_key_map(self.bands), positions), self.frequencies.inv_freq, like=like)

    def query_angles(self, positions: Tensor, like: Tensor) -> Angles:
        """Angles of queries at `positions` in every band, [bands, n, d/2]."""
        shape = len(positions), len(self.frequencies.inv_freq)
        mapped = torch.stack([pair_positions(band.query, positions).expand(shape) for band in self.bands])
        return angles(mapped, self.frequencies.inv_freq, factor=self.frequencies.attention_factor**2, like=like)

    def temperature(self, positions: Tensor) -> Tensor | None:
        """The factor on the logits of queries at `positions`, float64 [n]; None if it is 1."""
        if self.window is not None or self.named.scaler.member("temperature") is None:
            return None
        return self.named.configured.logit_factor(self.named.scaler, positions)

    def shifts(self, band: int, length: int) -> Tensor | None:
        """Cosines and sines by which `band` rotates the stored keys at positions 0 .. length - 1, or more of them.

        Returns:
            float32 [at least `length`, 2, d/2]; None if the band reads keys as they are stored.
        """
        key, stored = self.bands[band].key, stored_key_map(self.bands)
        if key is stored:
            return None
        held = self._shifts.get(band, torch.empty(0, 2, self.layout.dim // 2))
        if len(held) < length:
            positions = torch.arange(len(held), max(length, 2 * len(held)))
            shift = pair_positions(key, positions) - pair_positions(stored, positions)
            new = torch.stack(cos_sin(shift * self.frequencies.inv_freq, like=held), 1)
            self._shifts[band] = held = torch.cat([held, new])
        return held

    @cached_property
    def _shifts(self) -> dict[int, Tensor]:
        return {}

    def segment(self, queries: int, length: int, first: int) -> Segment:
        """The last `queries` of `length` tokens of a text, for keys from `first` on, as they are stored."""
        return Segment(
            scaler=self.named.scaler,
            start=0,
            stop=queries,
            length=self.named.length,
            first=first,
            offset=length - queries - first,
            bands=self.bands,
            frequencies=self.frequencies,
            temperature=self.temperature(torch.arange(length - queries, length)),
            stored=stored_key_map(self.bands),
        )
