"""Rotates queries and keys in layers with a sliding window, which keep the model's own attention under a patch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...scaling.rope import Frequencies, Scaler
from ..attention.rotation import Copies, angles
from .positions import visible_keys
from .probe import LayerRope


class WindowRotation:
    """The rotation of the layers with a window. It keeps their frequencies.

    If such a layer shares its frequencies with the other layers, a scaler changes them too, as it would in a config. A
    growing length does not change them.
    """

    def __init__(self) -> None:
        # by site and scaler, those of the last length: a growing one would leave many
        self._last: dict[object, tuple[int | None, Frequencies, Copies]] = {}

    def rotate(
        self,
        layer: LayerRope,
        scaler: Scaler,
        length: int | None,
        query: Tensor,
        key: Tensor,
        places: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys, each [B, heads, N, D], rotated to their places.

        Args:
            length: the fixed length of a scaler that depends on the length; None if it grows.
            places: those of the queries and of the keys, integers [N].
        """
        if layer.layout is None or layer.site is None:
            return query, key
        effective = layer.site.configured.effective(scaler)
        grows = effective.depends_on_length and length is None
        used = layer.site.configured.scaler if layer.site.is_local or grows else effective
        last = self._last.get((layer.site, used))
        if last is None or last[0] != length:
            found = used.frequencies(layer.site.configured.rope, length)
            last = self._last[layer.site, used] = length, found, Copies(found.inv_freq)
        _, frequencies, inv_freq = last
        rotated = []
        for x, positions in zip((query, key), places, strict=True):
            at = positions.to(torch.float64)[:, None]
            x_angles = angles(at, inv_freq.on(x.device), factor=frequencies.attention_factor, like=x)
            rotated.append(layer.layout.rotate(x, x_angles))
        return rotated[0], rotated[1]


def places_in_window(query: Tensor, key: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """The places of the queries and keys of a call, counted from the first key of the layer, and not of the text."""
    start = _first_query_index(mask, query.shape[2], key.shape[2])
    return (
        torch.arange(start, start + query.shape[2], device=query.device),
        torch.arange(key.shape[2], device=key.device),
    )


def _first_query_index(mask: Any, queries: int, keys: int) -> int:
    """The index of query 0 among the keys of a layer with a window. A static cache has room after the last query.

    Args:
        mask: the mask of the model's own attention. The last key that a query sees is its own, unless it is padding.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2) or queries == keys:
        return keys - queries
    seen = visible_keys(mask, keys).any(0)
    last = keys - 1 - seen.flip(1).to(torch.uint8).argmax(1)
    first_query = queries - len(last)
    return int((last - torch.arange(first_query, queries, device=last.device)).max())
