"""Rotated copies of un-rotated keys, for the attention of transformers' modules under a position map."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


def allocate(like: Tensor, capacity: int) -> Tensor:
    """An empty buffer for `capacity` keys, otherwise shaped as `like` [batch, kv_heads, n, head_dim]."""
    batch, heads, _, dim = like.shape
    return like.new_empty(batch, heads, capacity, dim)


class RotatedKeys:
    """Copies of one layer's keys, rotated for each band; made on first use, then extended.

    Attributes:
        capacity: keys that the layer has room for; the copies get as much.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self._rope_state: Hashable = None
        self._copies: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

    def get(self, rope_state: Hashable, band: int, keys: Tensor, rotate: Callable[[int, int], Tensor]) -> Tensor:
        """All of `keys` [B, K, M, D] rotated; `rotate(start, stop)` makes the part that is missing.

        Args:
            rope_state: what the angles depend on; copies of another state are dropped.
        """
        if rope_state != self._rope_state:
            self.clear()
            self._rope_state = rope_state
        length, needed = self._lengths.get(band, 0), keys.shape[2]
        copy = self._copies.get(band)
        if copy is None or copy.shape[2] < needed:
            grown = allocate(keys, max(needed, self.capacity))
            if copy is not None:
                grown[:, :, :length] = copy[:, :, :length]
            self._copies[band] = copy = grown
        if length < needed:
            copy[:, :, length:needed] = rotate(length, needed)
            self._lengths[band] = needed
        return copy[:, :, :needed]

    def crop(self, length: int) -> None:
        """Drop the keys beyond the first `length`."""
        self._lengths = {band: min(held, length) for band, held in self._lengths.items()}

    def clear(self) -> None:
        """Drop all copies."""
        self._copies, self._lengths = {}, {}

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch rows to every copy."""
        self._copies = {band: change(copy) for band, copy in self._copies.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers held."""
        return list(self._copies.values())
