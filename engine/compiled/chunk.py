"""Attention of a chunk of one sequence, in torch, under any scaler or sliding window.

Shape suffixes: N tokens of the chunk, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...scaling.band import Band, same
from ..attention import causal_attention
from ..bands.banded import banded_attention
from ..bands.kernel import Score
from ..bands.plan import Segment
from ..bands.rotation import angles
from ..bands.rows import Run
from ..kv_cache import KVLayer
from .turns import Turns


class Chunk:
    """Attention of one chunk in one group of layers, with what all its layers share."""

    def __init__(self, turns: Turns, run: Run) -> None:
        self._turns = turns
        self._run = run
        group, site = turns.group, turns.plan.site
        where = torch.arange(run.key_stop - run.query_stop, run.key_stop)
        self._angles = None
        if group.layout is not None and not turns.mapped:
            f = turns.frequencies
            self._angles = angles(where.double(), f.inv_freq, factor=f.attention_factor, like=torch.empty(0))
        self._temperature = None
        if turns.tempered and not turns.mapped:
            self._temperature = site.logit_factor(turns.plan.scaler, where).float()[:, None]
        self._work: list[tuple[Run, list[Segment]]] | None = None
        if turns.mapped:
            self._work = [(run, turns.plan.segments(run))]
        elif group.window is not None and run.key_stop > group.window:
            self._work = [(run, [_window(turns, run, group.window)])]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, score: Score) -> Tensor:
        """q [1, H, N, D], k and v [1, K, N, D] as they are projected; writes the cache; [1, H, N, D]."""
        layout = self._turns.group.layout
        if self._turns.mapped:
            keys, values = layer.update(k, v)
            assert self._work is not None
            return banded_attention(q, keys, values, score, layout, self._work, turned=layer.turned)
        if layout is not None:
            assert self._angles is not None
            q, k = layout.rotate(q, self._angles), layout.rotate(k, self._angles)
        if self._temperature is not None:
            q = q * self._temperature
        keys, values = layer.update(k, v)
        if self._work is None:
            return causal_attention(q, keys, values, score)
        return banded_attention(q, keys, values, score, None, self._work)


def _window(turns: Turns, run: Run, window: int) -> Segment:
    """The queries of a run under a sliding window, as one band."""
    band = Band(
        name="window",
        start=lambda i: (i - window + 1).clamp(min=0),
        stop=lambda i: i + 1,
        query=same,
        key=same,
    )
    return Segment(
        scaler=turns.plan.scaler,
        start=0,
        stop=run.query_stop,
        length=None,
        first=0,
        offset=run.key_stop - run.query_stop,
        bands=(band,),
        frequencies=turns.frequencies,
        temperature=None,
    )
