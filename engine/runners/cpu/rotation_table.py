"""What a scaler asks of single tokens: the angles of their queries and keys, and the keys that each band sees.

The compiled step's side of `plan`, which does the same for whole chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ....scaling.band import PLAIN, Band
from ....scaling.rope import Frequencies, Scaler
from ...attention.plan import Plan
from ...attention.rotation import Layout, angles
from ...kv_cache import KVLayer
from ...rotary_site import RotarySite

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers with the same rotation that see the same keys.

    Args:
        site: the rotary frequencies that rotate them; None for layers without rotation.
        layout: where their pairs lie.
        window: keys that a query sees at most, or None.
    """

    site: RotarySite | None
    layout: Layout | None
    window: int | None


class RotationTable:
    """One group under one scaler.

    Keys are held in one or more forms. Without a position map there is one form, rotated as transformers rotates them.
    With one, the first form is un-rotated and the others are rotated as the key maps of the bands say.

    Args:
        primary_rotary: the site used for layers without rotation.
        length: tokens that a scaler which depends on length is for.
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
        """The frequencies of the group; a window's own site keeps the model's."""
        site = self.plan.site
        scaler = site.configured.scaler if site.is_local else site.configured.effective(self.plan.scaler)
        return scaler.frequencies(site.configured.rope, self._length)

    @cached_property
    def key_bands(self) -> list[int]:
        """The bands whose key maps are held beside the un-rotated keys: the first with each map that rotates."""
        if not self.mapped or self.group.layout is None:
            return []
        some = torch.arange(1, 1 << 16)  # a map that keeps all of these at 0 keeps every key there
        firsts = {self._key_map(band): None for band in range(len(self._bands))}
        return [band for band in firsts if bool(self._bands[band].key(some).any())]

    @property
    def rope_state(self) -> tuple[Scaler, int | None, int]:
        """What rotated keys depend on, as `RotatedKeys` knows them."""
        return self.plan.scaler, self._length, 0

    def _key_map(self, band: int) -> int:
        return next(i for i, other in enumerate(self._bands) if other.key is self._bands[band].key)

    def form(self, band: int) -> int:
        """The form of the keys that `band` reads."""
        if not self.mapped or self.group.layout is None:
            return 0
        first = self._key_map(band)
        return 1 + self.key_bands.index(first) if first in self.key_bands else 0

    def angles(self, positions: Integers, half: int) -> tuple[Floats, Floats]:
        """Cosines and sines that rotate the tokens at `positions`.

        Returns:
            Those of the queries in every band, [bands, n, 2, half], and of the keys in every form,
            [forms, n, 2, half].
        """
        factor = self.frequencies.attention_factor
        if not self.mapped:
            both = self._angles(positions, factor, half)[None]
            return both, both
        at = torch.from_numpy(positions)
        queries = [band.query(at).numpy() for band in self._bands]
        keys = [np.zeros(len(positions)), *(self._bands[band].key(at).numpy() for band in self.key_bands)]
        return (
            np.stack([self._angles(mapped, factor**2, half) for mapped in queries]),
            np.stack([self._angles(mapped, 1.0, half) for mapped in keys]),
        )

    def _angles(self, positions: NDArray[np.generic], factor: float, half: int) -> Floats:
        found = np.empty((len(positions), 2, half), np.float32)
        if self.group.layout is None:
            found[:, 0], found[:, 1] = 1, 0
            return found
        rotation = np.asarray(positions, np.float64)[:, None] * self.frequencies.inv_freq.numpy()
        found[:, 0], found[:, 1] = np.cos(rotation) * factor, np.sin(rotation) * factor
        return found

    def scales(self, positions: Integers, scale: float) -> Floats:
        """The factor on the scores of every token, [n]."""
        if not self.tempered:
            return np.full(len(positions), scale, np.float32)
        factor = self.plan.site.logit_factor(self.plan.scaler, torch.from_numpy(positions))
        return (factor.numpy() * scale).astype(np.float32)

    def visible(self, position: int) -> list[tuple[int, int, int, int]]:
        """What the query at `position` sees: band, form of the keys, first key, keys."""
        if not self.mapped:
            start = 0 if self.group.window is None else max(0, position + 1 - self.group.window)
            return [(0, 0, start, position + 1 - start)]
        here = torch.tensor([position])
        found = []
        for index, band in enumerate(self._bands):
            start, stop = _border(band, here)
            if stop > start:
                found.append((index, self.form(index), start, stop - start))
        return found


def _border(band: Band, here: torch.Tensor) -> tuple[int, int]:
    return max(0, int(band.start(here))), int(band.stop(here))


_AT_ONCE = 4096  # keys that are rotated at a time


def rotate_cached_keys(layer: KVLayer, before: RotationTable, after: RotationTable) -> None:
    """Turn a layer's keys from one scaler's angles to another's, in place.

    Rotations add up, so the keys rotate by the difference; nothing of the text is read again. Exact but for the
    rounding of the cache.
    """
    held = [1.0 if rotation.mapped else rotation.frequencies.attention_factor for rotation in (before, after)]
    rates = [
        torch.zeros_like(rotation.frequencies.inv_freq) if rotation.mapped else rotation.frequencies.inv_freq
        for rotation in (before, after)
    ]
    layout = after.group.layout
    if layout is None or (held[0] == held[1] and torch.equal(*rates)):
        return
    layer.reserve(layer.length)
    layer.rotated.clear()
    for start in range(0, layer.length, _AT_ONCE):
        stop = min(start + _AT_ONCE, layer.length)
        where = torch.arange(start, stop, dtype=torch.float64)
        keys = layer.key_rows(start, stop)
        rotate = angles(where, rates[1] - rates[0], factor=held[1] / held[0], like=keys)
        layer.write_keys(start, layout.rotate(keys, rotate))
