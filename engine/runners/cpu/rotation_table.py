"""A scaler for single tokens: the angles of their queries and keys, and the keys that each band sees.

The compiled step uses it. `attention/plan.py` does the same for whole chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....scaling.band import PLAIN
from ....scaling.rope import Frequencies, Scaler
from ...attention.plan import Plan
from ...attention.rotation import Layout, angles
from ...kv_cache import KVLayer
from ...rotary_site import RotarySite

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers with the same rotation and the same window.

    Args:
        site: the rotary site with their frequencies; None for layers without rotation.
        layout: the places of their rotary pairs; None for layers without rotation.
        window: the most keys that a query sees, or None for all.
    """

    site: RotarySite | None
    layout: Layout | None
    window: int | None


class RotationTable:
    """One group of layers under one scaler.

    Keys are stored in one or more forms. Without a position map there is one form, rotated as in transformers. With a
    position map the first form is un-rotated, and each key map of a band that rotates adds a rotated form.

    Args:
        primary_rotary: the site to use for layers without rotation.
        length: the length of a scaler that depends on the length.
    """

    def __init__(self, group: LayerGroup, primary_rotary: RotarySite, scaler: Scaler, length: int | None) -> None:
        self.group = group
        self.plan = Plan(group.site or primary_rotary, scaler, length)
        local = group.window is not None
        self.tempered = not local and scaler.member("temperature") is not None
        self.mapped = not local and scaler.member("positions") is not None
        self._bands = self.plan.site.bands(scaler, length) if self.mapped else (PLAIN,)
        self._length = length

    @cached_property
    def frequencies(self) -> Frequencies:
        """The frequencies of the group. A site of its own for window layers keeps the model's frequencies."""
        site = self.plan.site
        scaler = site.configured.scaler if site.is_local else site.configured.effective(self.plan.scaler)
        return scaler.frequencies(site.configured.rope, self._length)

    @cached_property
    def key_bands(self) -> list[int]:
        """The bands whose rotated keys are stored beside the un-rotated ones: the first band of each key map."""
        if not self.mapped or self.group.layout is None:
            return []
        sample = torch.arange(1, 1 << 16)  # a map of all these to 0 maps every key to 0, and does not rotate
        firsts = {self._key_map(band): None for band in range(len(self._bands))}
        return [band for band in firsts if bool(self._bands[band].key(sample).any())]

    @property
    def rope_state(self) -> tuple[Scaler, int | None, int]:
        """The state that rotated keys depend on, for `RotatedKeys`."""
        return self.plan.scaler, self._length, 0

    def _key_map(self, band: int) -> int:
        return next(i for i, other in enumerate(self._bands) if other.key is self._bands[band].key)

    def form(self, band: int) -> int:
        """The index of the form of the keys that `band` reads."""
        if not self.mapped or self.group.layout is None:
            return 0
        first = self._key_map(band)
        return 1 + self.key_bands.index(first) if first in self.key_bands else 0

    def rotated_copies(self, layer: KVLayer, count: int) -> list[Tensor]:
        """The rotated copies of a layer's keys, one for each of `key_bands`, with room for `count` more keys."""
        layout, keys = self.group.layout, layer.keys[:, :, : layer.length]
        assert layout is not None

        def rotate_band(band: int) -> Callable[[int, int], Tensor]:
            def rotate(start: int, stop: int) -> Tensor:
                positions = self._bands[band].key(torch.arange(start, stop))
                return layout.rotate(keys[:, :, start:stop], angles(positions, self.frequencies.inv_freq, like=keys))

            return rotate

        return [layer.rotated.room(self.rope_state, band, keys, rotate_band(band), count) for band in self.key_bands]

    def angles(self, positions: Integers, half: int) -> tuple[Floats, Floats]:
        """Cosines and sines for the tokens at `positions`.

        Returns:
            For the queries in every band, [bands, n, 2, half], and for the keys in every form, [forms, n, 2, half].
        """
        factor = self.frequencies.attention_factor
        if not self.mapped:
            both = self._angles(positions, factor, half)[None]
            return both, both
        tokens = torch.from_numpy(positions)
        queries = [band.query(tokens).numpy() for band in self._bands]
        keys = [np.zeros(len(positions)), *(self._bands[band].key(tokens).numpy() for band in self.key_bands)]
        return (
            np.stack([self._angles(mapped, factor**2, half) for mapped in queries]),
            np.stack([self._angles(mapped, 1.0, half) for mapped in keys]),
        )

    def _angles(self, positions: NDArray[np.generic], factor: float, half: int) -> Floats:
        cos_sin = np.empty((len(positions), 2, half), np.float32)
        if self.group.layout is None:
            cos_sin[:, 0], cos_sin[:, 1] = 1, 0
            return cos_sin
        phases = np.asarray(positions, np.float64)[:, None] * self.frequencies.inv_freq.numpy()
        cos_sin[:, 0], cos_sin[:, 1] = np.cos(phases) * factor, np.sin(phases) * factor
        return cos_sin

    def scales(self, positions: Integers, scale: float) -> Floats:
        """The factor on the scores of every token, [n]."""
        if not self.tempered:
            return np.full(len(positions), scale, np.float32)
        factor = self.plan.site.logit_factor(self.plan.scaler, torch.from_numpy(positions))
        return (factor.numpy() * scale).astype(np.float32)

    def visible(self, position: int) -> list[tuple[int, int, int, int]]:
        """The keys that the query at `position` sees: (band, form of the keys, first key, number of keys)."""
        if not self.mapped:
            start = 0 if self.group.window is None else max(0, position + 1 - self.group.window)
            return [(0, 0, start, position + 1 - start)]
        query = torch.tensor([position])
        spans = []
        for index, band in enumerate(self._bands):
            start, stop = max(0, int(band.start(query))), int(band.stop(query))
            if stop > start:
                spans.append((index, self.form(index), start, stop - start))
        return spans


_ROTATED_AT_A_TIME = 4096  # keys


def rotate_cached_keys(layer: KVLayer, before: RotationTable, after: RotationTable) -> None:
    """Rotate a layer's keys from the angles of one scaler to those of another, in place.

    Rotations add up, so the keys rotate by the difference of the angles, and the text is not read again. This is exact
    up to the rounding of the cache.
    """
    factors = [1.0 if rotation.mapped else rotation.frequencies.attention_factor for rotation in (before, after)]
    inv_freqs = [
        torch.zeros_like(rotation.frequencies.inv_freq) if rotation.mapped else rotation.frequencies.inv_freq
        for rotation in (before, after)
    ]
    layout = after.group.layout
    if layout is None or (factors[0] == factors[1] and torch.equal(*inv_freqs)):
        return
    layer.reserve(layer.length)
    layer.rotated.clear()
    for start in range(0, layer.length, _ROTATED_AT_A_TIME):
        stop = min(start + _ROTATED_AT_A_TIME, layer.length)
        positions = torch.arange(start, stop, dtype=torch.float64)
        keys = layer.key_rows(start, stop)
        difference = angles(positions, inv_freqs[1] - inv_freqs[0], factor=factors[1] / factors[0], like=keys)
        layer.write_keys(start, layout.rotate(keys, difference))
