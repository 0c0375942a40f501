"""The attention of a chunk of one sequence in torch, on any device.

Shape suffixes: N tokens of the chunk, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...scaling.band import newest
from ..attention.banded import banded_attention
from ..attention.causal import causal_attention
from ..attention.kernel import AttentionScore
from ..attention.plan import Segment
from ..attention.rotation import cos_sin
from ..attention.rows import KeyRun, first_seen
from ..kv_cache import KVLayer
from .rotation_table import RotationTable

Attend = Callable[[int, Tensor, Tensor, Tensor, AttentionScore], Tensor]
"""Attention of a layer: its index, projected q [1, H, N, D], k and v [1, K, N, D] -> [1, H, N, D]."""


class ChunkAttention:
    """Attention of one chunk in one group of layers, and the values that these layers share.

    Args:
        like: has the device, and the dtype of the arithmetic; None is float32 on the CPU.
    """

    def __init__(self, rotation: RotationTable, run: KeyRun, like: Tensor | None = None) -> None:
        like = torch.empty(0) if like is None else like
        self._rotation = rotation
        group = rotation.group
        positions = torch.arange(run.key_stop - run.query_stop, run.key_stop)
        self._angles = None
        if group.layout is not None:
            phases = rotation.key_phases(positions)
            self._angles = cos_sin(phases, factor=rotation.key_factor, like=like)
        temperature = None if rotation.mapped else rotation.temperature(positions)
        self._temperature = None if temperature is None else temperature.to(like)[:, None]
        self._work: list[tuple[KeyRun, list[Segment]]] | None = None
        if rotation.mapped:
            self._work = [(run, [rotation.segment(run)])]
        self._first = 0 if rotation.mapped else first_seen(group.window, run.query_stop, run.key_stop)
        if group.window is not None and not rotation.mapped and run.key_stop > group.window:
            held = replace(run, key_stop=run.key_stop - self._first)
            self._work = [(held, [_window(rotation, held, group.window)])]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, score: AttentionScore) -> Tensor:
        """Attention of projected q [1, H, N, D], k and v [1, K, N, D] -> [1, H, N, D]; it also writes the cache."""
        layout, mapped = self._rotation.group.layout, self._rotation.mapped
        if layout is not None:
            assert self._angles is not None
            k = layout.rotate(k, self._angles)
            q = q if mapped else layout.rotate(q, self._angles)
        if self._temperature is not None:
            q = (q * self._temperature).to(q.dtype)
        keys, values = layer.update(k, v, self._first)
        if self._work is None:
            return causal_attention(q, keys, values, score)
        if mapped:  # once for all blocks, where the cache is narrower
            keys, values = keys.to(q.dtype), values.to(q.dtype)
        return banded_attention(q, keys, values, score, layout if mapped else None, self._work)


def _window(rotation: RotationTable, run: KeyRun, window: int) -> Segment:
    """The queries of a run as one segment whose only band is a sliding window."""
    return Segment(
        scaler=rotation.scaler,
        start=0,
        stop=run.query_stop,
        length=None,
        first=0,
        offset=run.key_stop - run.query_stop,
        bands=(newest(window),),
        frequencies=rotation.frequencies,
        temperature=None,
    )
