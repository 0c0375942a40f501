"""Attention of one chunk with bfloat16 products: what each band sees, and the operands of the compiled kernel.

Shape suffixes: H query heads, K key-value heads, N queries, M keys, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....scaling.band import pair_positions
from ...attention.kernel import AttentionScore
from ...attention.rotation import Angles, Layout, cos_sin
from ...attention.rows import KeyRun, first_seen
from ...kv_cache import KVLayer
from ..rotation_table import RotationTable
from .threads import share_threads

_PIECE = 1 << 15  # keys whose values are stored at a time, in whole groups


@dataclass(frozen=True)
class BandPart:
    """The part of a chunk's attention that is in one band.

    Args:
        queries: the angles of its queries; None without rotation.
        lows, highs: query n sees the keys lows[n] to highs[n] - 1, int32 [N].
        shift: the angles by which it rotates stored keys from `first` on; None if it reads them as they are.
        first: the first key of a group.

    Keys are counted from the first one that is given to `banded_products`.
    """

    queries: Angles | None
    lows: Tensor
    highs: Tensor
    shift: Angles | None
    first: int


class BFloat16Attention:
    """Attention of one chunk in one group of layers, and the values that these layers share.

    Queries, keys, weights and values are rounded to bfloat16. Scores, sums and the softmax are float32.
    """

    def __init__(self, rotation: RotationTable, run: KeyRun) -> None:
        self._rotation = rotation
        like, positions = torch.empty(0), torch.arange(run.key_stop - run.query_stop, run.key_stop)
        layout, f = rotation.group.layout, rotation.frequencies
        self._key_angles = None
        if layout is not None:
            self._key_angles = cos_sin(rotation.key_phases(positions), factor=rotation.key_factor, like=like)
        temperature = rotation.temperature(positions)
        self._temperature = None if temperature is None else temperature.float()[:, None]
        self._first = 0  # of the keys that are read
        self._bands: list[BandPart] = []
        if not rotation.mapped:
            window = rotation.group.window or run.key_stop
            self._first = first_seen(rotation.group.window, run.query_stop, run.key_stop)
            lows, highs = (positions - window + 1).clamp(min=0) - self._first, positions + 1 - self._first
            self._bands = [BandPart(self._key_angles, lows.int(), highs.int(), None, 0)]
            return
        for band in rotation.bands:
            lows = band.start(positions).clamp(min=0)
            highs = torch.maximum(band.stop(positions), lows)
            seen = highs > lows
            if not seen.any():
                continue
            queries, shift, first = None, None, 0
            if layout is not None:
                phases = pair_positions(band.query, positions) * f.inv_freq
                queries = cos_sin(phases, factor=f.attention_factor**2, like=like)
                if band.key is not rotation.stored:
                    first = first_in_group(int(lows[seen].min()))
                    keys = torch.arange(first, int(highs[seen].max()))
                    shift = cos_sin(rotation.shift(band.key, keys) * f.inv_freq, like=like)
            self._bands.append(BandPart(queries, lows.int(), highs.int(), shift, first))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: KVLayer, score: AttentionScore) -> Tensor:
        """Attention of projected q [1, H, N, D], k and v [1, K, N, D] -> [1, H, N, D]; it also writes the cache."""
        layout = self._rotation.group.layout
        if layout is not None:
            assert self._key_angles is not None
            k = layout.rotate(k, self._key_angles)
        keys, values = (x[0].bfloat16() for x in layer.update(k, v, self._first))
        return banded_products(q[0], keys, values, self._bands, layout, score, self._temperature, share_threads())[None]


def banded_products(
    q_HND: Tensor,
    k_KMD: Tensor,
    v_KMD: Tensor,
    bands: Sequence[BandPart],
    layout: Layout | None,
    score: AttentionScore,
    temperature: Tensor | None,
    threads: int,
) -> Tensor:
    """The attention of a chunk, float32 [H, N, D].

    Args:
        q_HND: un-rotated.
        k_KMD, v_KMD: bfloat16; the keys as they are stored.
        layout: None for a layer without rotation.
        temperature: the factor on the logits of every query, float32 [N, 1]; None if it is 1.
    """
    q = q_HND.float() * (score.scale / math.log(2))
    if temperature is not None:
        q = q * temperature
    state = Softmax(q.shape, len(k_KMD), score.softcap, threads)
    operands = []
    for band in bands:
        queries, seen = q, k_KMD
        if layout is not None and band.queries is not None:
            queries = layout.rotate(q, band.queries)
            if band.shift is not None:
                seen = layout.rotate(k_KMD[:, band.first : band.first + len(band.shift.cos)], band.shift)
        operands.append((band, state.packed(queries), seen))
    for start in range(0, k_KMD.shape[1], _PIECE):
        stop = min(start + _PIECE, k_KMD.shape[1])
        values = in_groups(v_KMD[:, start:stop])
        for band, queries, seen in operands:
            limits = (x.clamp(start, stop) for x in (band.lows, band.highs))
            state.add(queries, seen, band.first, values, start, *limits)
    return state.result()


class Softmax:
    """The state of an attention whose keys are added piece by piece.

    Args:
        shape: H, N, D.
        key_heads: K.
    """

    def __init__(self, shape: tuple[int, ...], key_heads: int, softcap: float | None, threads: int) -> None:
        from .kernels.lanes import TILE

        self._shape, self._tile, self._threads = shape, TILE, threads
        self._cap = 0.0 if softcap is None else softcap / math.log(2)
        H, N, D = shape
        self._heads, self._rows = key_heads, H // key_heads * N
        tiles = -(-self._rows // TILE)
        self._out = torch.zeros(key_heads, tiles, D, TILE)
        self._peaks = torch.full((key_heads, tiles, TILE), -1e30)
        self._sums = torch.zeros(key_heads, tiles, TILE)

    def packed(self, q_HND: Tensor) -> Tensor:
        """Queries as the kernel reads them: int32 [K, tiles, D / 2, TILE]."""
        K, tiles, D = self._out.shape[:3]
        rows = torch.zeros(K, tiles * self._tile, D, dtype=torch.bfloat16)
        rows[:, : self._rows] = q_HND.reshape(K, self._rows, D)
        return rows.view(torch.int32).view(K, tiles, self._tile, D // 2).transpose(2, 3).contiguous()

    def add(
        self, queries: Tensor, keys: Tensor, first: int, values: Tensor, start: int, lows: Tensor, highs: Tensor
    ) -> None:
        """Add the keys that every query sees.

        Args:
            keys: bfloat16 [K, M, D], from key `first` on.
            values: the values from key `start` on, as `in_groups` gives them.
            lows, highs: int32 [N].
        """
        from .kernels import flash

        D = self._shape[2]
        flash(
            queries.numpy(),
            keys.data_ptr() - 2 * D * first,
            2 * keys.stride(0),
            values.data_ptr() - 2 * D * start,
            2 * values.stride(0),
            self._cap,
            self._limits(lows).numpy(),
            self._limits(highs).numpy(),
            self._out.numpy(),
            self._peaks.numpy(),
            self._sums.numpy(),
            self._threads,
        )

    def _limits(self, limits: Tensor) -> Tensor:
        """The limits of every lane. Lanes without a query have those of the last one."""
        tiles = self._out.shape[1]
        rows = limits.repeat(self._rows // len(limits))
        return torch.cat([rows, rows[-1:].expand(tiles * self._tile - self._rows)]).view(tiles, self._tile)

    def result(self) -> Tensor:
        """The attention of every query, float32 [H, N, D]."""
        out = (self._out / self._sums[:, :, None]).transpose(2, 3).flatten(1, 2)
        return out[:, : self._rows].reshape(self._shape)


def first_in_group(key: int) -> int:
    """The first key of the group of a key."""
    from .kernels.lanes import GROUP

    return key // GROUP * GROUP


def in_groups(v_KMD: Tensor) -> Tensor:
    """The values of each group of keys side by side, [K, groups, D, 32]. A last group that is not full has zeros."""
    from .kernels.lanes import GROUP

    K, M, D = v_KMD.shape
    padded = torch.nn.functional.pad(v_KMD, (0, 0, 0, -M % GROUP))
    return padded.view(K, -1, GROUP, D).transpose(2, 3).contiguous()
