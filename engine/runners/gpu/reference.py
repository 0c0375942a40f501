"""The operations of a decode step in torch: for any device, also in float64, and to compare the kernels with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, rms_norm, silu

from ...attention.rotation import Angles, Layout
from ...kv_cache import Int8Layer, KVLayer, int8_rows
from .ops import Activation, CacheRows, StepBands, TokenTree


class TorchOps:
    """`Ops` in torch. The arithmetic is float32, and float64 for float64 arguments; results are rounded once.

    Attention takes memory and time for the whole capacity of a cache.
    """

    def add_norm(
        self,
        x_NE: Tensor,
        delta_NE: Tensor | None,
        after_E: Tensor | None,
        before_E: Tensor | None,
        epsilon: float,
        dtype: torch.dtype,
    ) -> Tensor:
        if delta_NE is not None:
            x_NE += _rms(delta_NE.to(x_NE.dtype), after_E, epsilon)
        return _rms(x_NE, before_E, epsilon).to(dtype, copy=True)

    def heads(
        self,
        qkv: Tensor,
        H: int,
        K: int,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        whole: bool,
        epsilon: float,
        key_angles: Tensor,
        layout: Layout | None,
        rows: CacheRows,
    ) -> Tensor:
        N, D = len(qkv), qkv.shape[1] // (H + 2 * K)
        query, key, value = torch.split(qkv.to(_arithmetic(qkv)), [H * D, K * D, K * D], 1)
        if not whole:
            query, key = query.view(N, H, D), key.view(N, K, D)
        query, key = _rms(query, query_norm, epsilon), _rms(key, key_norm, epsilon)
        key_NKD, value_NKD = key.view(N, K, D), value.view(N, K, D)
        if layout is not None:
            cos, sin = key_angles[:, None].unbind(2)
            key_NKD = layout.rotate(key_NKD, Angles(cos, sin))
        for n, layer in enumerate(rows.layers):
            slot = rows.slots[n : n + 1]
            _write(layer, "key", slot, key_NKD[n, :, None])
            _write(layer, "value", slot, value_NKD[n, :, None])
        return query.view(N, H, D).to(qkv.dtype)

    def attention(
        self,
        q_NHD: Tensor,
        rows: CacheRows,
        bands: StepBands,
        layout: Layout | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> Tensor:
        mixed = [_attend(q_NHD, n, layer, bands, layout, softcap, tree) for n, layer in enumerate(rows.layers)]
        return torch.stack(mixed).flatten(1).to(q_NHD.dtype)

    def int8_linear(self, x_NI: Tensor, weight_RI: Tensor, scale_R: Tensor) -> Tensor:
        dtype = _arithmetic(x_NI)
        return (linear(x_NI.to(dtype), weight_RI.to(dtype)) * scale_R).to(x_NI.dtype)

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up.to(_arithmetic(gate_up)).chunk(2, -1)
        active = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
        return (active * up).to(gate_up.dtype)


def _arithmetic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rms(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """The RMS norm in the dtype of `x`; `x` itself without weights."""
    return x if weight is None else rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)


def _write(layer: KVLayer, kind: str, slot: Tensor, states: Tensor) -> None:
    """Write keys or values [K, 1, D] into the slot, an index [1] on the device."""
    numbers: Tensor = getattr(layer, kind + "s")[0]
    if isinstance(layer, Int8Layer):
        states, steps = int8_rows(states)
        scales: Tensor = getattr(layer, kind + "_scales")[0]
        scales.index_copy_(1, slot, steps)
    numbers.index_copy_(1, slot, states.to(numbers.dtype))


def _read(layer: KVLayer, kind: str, slots: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values as numbers [K, n, D]: all, or those in `slots`."""
    numbers: Tensor = getattr(layer, kind + "s")[0]
    scales: Tensor | None = getattr(layer, kind + "_scales")[0] if isinstance(layer, Int8Layer) else None
    if slots is not None:
        numbers = numbers[:, slots]
        scales = None if scales is None else scales[:, slots]
    numbers = numbers.to(dtype)
    return numbers if scales is None else numbers * scales[..., None]


def _attend(
    q_NHD: Tensor,
    n: int,
    layer: KVLayer,
    bands: StepBands,
    layout: Layout | None,
    softcap: float | None,
    tree: TokenTree | None,
) -> Tensor:
    """Attention of token n, [H, D]."""
    dtype = _arithmetic(q_NHD)
    slots = None if tree is None else _slots(tree, n, layer.capacity)
    keys, values = (_read(layer, kind, slots, dtype) for kind in ("key", "value"))
    K, M, D = keys.shape
    query, positions = q_NHD[n].to(dtype)[:, None], torch.arange(M, device=keys.device)
    scores_KGM = keys.new_full((K, len(query) // K, M), -torch.inf)
    used = torch.zeros_like(positions, dtype=torch.bool)
    for band, shifts in enumerate(bands.shifts):
        rotated, band_keys = query, keys
        if layout is not None:
            rotated = layout.rotate(query, Angles(*bands.queries[band, n][:, None]))
            if shifts is not None:
                count = len(shifts[:M])  # a table can end before the capacity; no query sees the keys there
                moved = layout.rotate(keys[:, :count], Angles(shifts[:count, 0], shifts[:count, 1]))
                band_keys = torch.cat((moved, keys[:, count:]), 1)
        scores = rotated.view(K, -1, D) @ band_keys.mT * bands.scales[n]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        start, stop = bands.edges[n, band]
        seen = (start <= positions) & (positions < stop)
        scores_KGM, used = torch.where(seen, scores, scores_KGM), used | seen
    values = torch.where(used[:, None], values, 0)  # what was never written can be NaN
    return (torch.softmax(scores_KGM, -1) @ values).view(-1, D)


def _slots(tree: TokenTree, n: int, capacity: int) -> Tensor:
    """The slot of the key at every position that token n can see."""
    before = torch.arange(tree.start, device=tree.ancestors.device)
    return torch.cat((before, tree.ancestors[n].clamp(0, capacity - 1)))
