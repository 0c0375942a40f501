"""Attention of a chunk of one sequence, in torch, under any scaler or sliding window.

Shape suffixes: N tokens of the chunk, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....scaling.band import Band, same
from ...attention.banded import banded_attention
from ...attention.causal import causal_attention
from ...attention.kernel import Score
from ...attention.plan import Segment
from ...attention.rotation import angles
from ...attention.rows import Run
from ...kv_cache import KVLayer
from .rotation_table import RotationTable


class Chunk:
    """Attention of one chunk in one group of layers, with what all its layers share."""

    def __init__(self, rotation: RotationTable, run: Run) -> None:
        self._rotation = rotation
        self._run = run
        group, site = rotation.group, rotation.plan.site
        where = torch.arange(run.key_stop - run.query_stop, run.key_stop)
        self._angles = None
        if group.layout is not None and not rotation.mapped:
            f = rotation.frequencies
            self._angles = angles(where.double(), f.inv_freq, factor=f.attention_factor, like=torch.empty(0))
        self._temperature = None
        if rotation.tempered and not rotation.mapped:
            self._temperature = site.logit_factor(rotation.plan.scaler, where).float()[:, None]
        self._work: list[tuple[Run, list[Segment]]] | None = None
        if rotation.mapped:
            self._work = [(run, rotation.plan.segments(run))]
        elif group.window is not None and run.key_stop > group.window:
            self._work = [(run, [_window(rotation, run, group.window)])]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, score: Score) -> Tensor:
        """q [1, H, N, D], k and v [1, K, N, D] as they are projected; writes the cache; [1, H, N, D]."""
        layout = self._rotation.group.layout
        if self._rotation.mapped:
            keys, values = layer.update(k, v)
            assert self._work is not None
            return banded_attention(q, keys, values, score, layout, self._work, rotated=layer.rotated)
        if layout is not None:
            assert self._angles is not None
            q, k = layout.rotate(q, self._angles), layout.rotate(k, self._angles)
        if self._temperature is not None:
            q = q * self._temperature
        keys, values = layer.update(k, v)
        if self._work is None:
            return causal_attention(q, keys, values, score)
        return banded_attention(q, keys, values, score, None, self._work)


def _window(rotation: RotationTable, run: Run, window: int) -> Segment:
    """The queries of a run under a sliding window, as one band."""
    band = Band(
        name="window",
        start=lambda i: (i - window + 1).clamp(min=0),
        stop=lambda i: i + 1,
        query=same,
        key=same,
    )
    return Segment(
        scaler=rotation.plan.scaler,
        start=0,
        stop=run.query_stop,
        length=None,
        first=0,
        offset=run.key_stop - run.query_stop,
        bands=(band,),
        frequencies=rotation.frequencies,
        temperature=None,
    )
