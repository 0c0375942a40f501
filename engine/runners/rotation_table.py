"""A scaler for single tokens: the angles of their queries and keys, and the keys that each band sees.

The compiled step uses them. For whole chunks `attention/plan.py` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UnsupportedModel
from ...scaling.band import PLAIN, PositionMap, pair_positions, same, stored_key_map
from ...scaling.rope import Frequencies, Scaler
from ..attention.plan import Segment
from ..attention.rotation import Layout, cos_sin
from ..attention.rows import KeyRun
from ..kv_cache import KVLayer
from ..patches.probe import LayerRope
from ..rotary_site import RotarySite
from .family import Decoder

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


def groups_of(d: Decoder, ropes: dict[int, LayerRope]) -> tuple[list[LayerGroup], list[int]]:
    """The groups of layers with the same rotation, and the index of every layer's group."""
    groups: dict[tuple[RotarySite | None, Layout | None, int | None], int] = {}
    group_of = []
    for index, layer in enumerate(d.layers):
        rope = ropes[index]
        if rope.is_local != (layer.window is not None):
            raise UnsupportedModel(f"the local attention of layer {index} is not a sliding window")
        key = (rope.site, rope.layout, layer.window)
        group_of.append(groups.setdefault(key, len(groups)))
    layouts = {layout for _, layout, _ in groups if layout is not None}
    if len(layouts) > 1:
        raise UnsupportedModel("its layers have their rotary pairs at different places")
    return [LayerGroup(*key) for key in groups], group_of


class RotationTable:
    """One group of layers under one scaler.

    A cache holds every key once, rotated to its *stored position*. Without a position map that is its own position.
    With one it is the position that the bands of most keys give it, and these bands read keys as they are. A band with
    another key map, such as the window of ReRoPE, rotates them further when it reads them, by the *shift* from the
    stored position to its own.

    Args:
        primary_rotary: the site to use for layers without rotation.
        length: the length of a scaler that depends on the length.
    """

    def __init__(self, group: LayerGroup, primary_rotary: RotarySite, scaler: Scaler, length: int | None) -> None:
        self.group = group
        self.site, self.scaler = group.site or primary_rotary, scaler
        local = group.window is not None
        self._tempered = not local and scaler.member("temperature") is not None
        self.mapped = not local and scaler.member("positions") is not None
        self.bands = self.site.bands(scaler, length) if self.mapped else (PLAIN,)
        self.stored = stored_key_map(self.bands)
        self._length = length
        self._shifts: dict[PositionMap, Floats] = {}

    @cached_property
    def frequencies(self) -> Frequencies:
        """The frequencies of the group. A site of its own for window layers keeps the model's frequencies."""
        configured = self.site.configured
        scaler = configured.scaler if self.site.is_local else configured.effective(self.scaler)
        return scaler.frequencies(configured.rope, self._length)

    @property
    def key_factor(self) -> float:
        """The factor on cos and sin of stored keys. Under a position map queries have it twice."""
        return 1.0 if self.mapped else self.frequencies.attention_factor

    def key_phases(self, positions: Tensor) -> Tensor:
        """The angles of stored keys at `positions`, float64 [n, half]."""
        return pair_positions(self.stored, positions) * self.frequencies.inv_freq

    def angles(self, positions: Integers, half: int) -> tuple[Floats, Floats]:
        """Cosines and sines for the tokens at `positions`.

        Returns:
            For the queries in every band, [bands, n, 2, half], and for the stored keys, [n, 2, half].
        """
        factor, tokens = self.frequencies.attention_factor, torch.from_numpy(positions)
        if not self.mapped:
            both = self._cos_sin(pair_positions(same, tokens), factor, half)
            return both[None], both
        queries = [self._cos_sin(pair_positions(band.query, tokens), factor**2, half) for band in self.bands]
        return np.stack(queries), self._cos_sin(pair_positions(self.stored, tokens), 1.0, half)

    def shifts(self, band: int, count: int) -> Floats | None:
        """Cosines and sines by which `band` rotates stored keys, float32 [at least `count`, 2, half].

        Row j is for the key at position j. None if the band reads keys as they are. The address of the result changes
        when a later call asks for more rows.
        """
        key = self.bands[band].key
        if key is self.stored or self.group.layout is None:
            return None
        half = self.group.layout.dim // 2
        held = self._shifts.get(key, np.empty((0, 2, half), np.float32))
        if len(held) < count:
            positions = torch.arange(len(held), max(count, 2 * len(held)))
            new = self._cos_sin(self.shift(key, positions), 1.0, half)
            self._shifts[key] = held = np.concatenate([held, new])
        return held

    def shift(self, key: PositionMap, positions: Tensor) -> Tensor:
        """How far keys move from their stored positions to those of the map `key`, [n, half], or [n, 1] for all."""
        return pair_positions(key, positions) - pair_positions(self.stored, positions)

    def _cos_sin(self, positions: Tensor, factor: float, half: int) -> Floats:
        result = np.empty((len(positions), 2, half), np.float32)
        if self.group.layout is None:
            result[:, 0], result[:, 1] = 1, 0
            return result
        phases = (positions * self.frequencies.inv_freq).numpy()
        result[:, 0], result[:, 1] = np.cos(phases) * factor, np.sin(phases) * factor
        return result

    def scales(self, positions: Integers, scale: float) -> Floats:
        """The factor on the scores of every token, [n]."""
        factor = self.temperature(torch.from_numpy(positions))
        if factor is None:
            return np.full(len(positions), scale, np.float32)
        return (factor.numpy() * scale).astype(np.float32)

    def temperature(self, positions: Tensor) -> Tensor | None:
        """The factor on the logits of every token, float64 [n], with the model's own temperature; None if it is 1."""
        own = self.site.configured.temperature
        factor = self.site.logit_factor(self.scaler, positions) if self._tempered else None
        if own is None:
            return factor
        applied = own.logit_factor(positions, self.site.configured.rope)
        return applied if factor is None else factor * applied

    def visible(self, position: int) -> list[tuple[int, int, int]]:
        """The keys that the query at `position` sees: (band, first key, number of keys)."""
        if not self.mapped:
            start = 0 if self.group.window is None else max(0, position + 1 - self.group.window)
            return [(0, start, position + 1 - start)]
        query = torch.tensor([position])
        spans = []
        for index, band in enumerate(self.bands):
            start, stop = max(0, int(band.start(query))), int(band.stop(query))
            if stop > start:
                spans.append((index, start, stop - start))
        return spans

    def segment(self, run: KeyRun) -> Segment:
        """The queries of a run under the position map, for keys as they are stored."""
        positions = torch.arange(run.key_stop - run.query_stop, run.key_stop)
        return Segment(
            scaler=self.scaler,
            start=0,
            stop=run.query_stop,
            length=self._length,
            first=0,
            offset=run.key_stop - run.query_stop,
            bands=self.bands,
            frequencies=self.frequencies,
            temperature=self.temperature(positions),
            stored=self.stored,
        )

    def moved_keys(self, layer: KVLayer, first: int, count: int) -> Tensor:
        """The keys after the first `first` and `count` more, rotated for places `count` earlier, [1, K, n, D]."""
        keys, positions = layer.key_rows(first + count, layer.length), torch.arange(first + count, layer.length)
        if self.group.layout is None:
            return keys
        phases = self.key_phases(positions - count) - self.key_phases(positions)
        return self.group.layout.rotate(keys, cos_sin(phases, like=keys))


_ROTATED_AT_A_TIME = 4096  # keys


def rotate_cached_keys(layer: KVLayer, before: RotationTable, after: RotationTable) -> None:
    """Rotate a layer's keys from the stored positions of one scaler to those of another, in place.

    Rotations add up, so the keys rotate by the difference of the angles, and the text is not read again. This is exact
    up to the rounding of the cache.
    """
    layout, factor = after.group.layout, after.key_factor / before.key_factor
    if layout is None:
        return
    for start in range(0, layer.length, _ROTATED_AT_A_TIME):
        stop = min(start + _ROTATED_AT_A_TIME, layer.length)
        positions = torch.arange(start, stop)
        phases = after.key_phases(positions) - before.key_phases(positions)
        if factor == 1 and not phases.any():
            continue
        layer.reserve(layer.length)
        keys = layer.key_rows(start, stop)
        layer.write_keys(start, layout.rotate(keys, cos_sin(phases, factor=factor, like=keys)))
