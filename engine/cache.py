"""The key-value cache: one buffer a layer, allocated once, written in place.

transformers' DynamicCache concatenates, which copies the whole cache at every step; here a step writes
its own rows and attention reads a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class ContiguousLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [batch, kv_heads, capacity, head_dim]; doubles when full."""

    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: Tensor) -> Tensor:
        batch, heads, _, dim = like.shape
        return like.new_empty(batch, heads, self.capacity, dim)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, n, head_dim] and return views of everything held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.capacity:
            self._grow(end)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _grow(self, needed: int) -> None:
        self.capacity = max(needed, 2 * self.capacity)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._allocate(old)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number comes negative, as transformers has it."""
        assert -self.length <= tokens_to_remove <= 0, (tokens_to_remove, self.length)
        self.length += tokens_to_remove

    def reset(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def attends_to_everything(config: PreTrainedConfig) -> bool:
    """True if every layer of the model is plain causal attention over the whole past."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def new_cache(config: PreTrainedConfig, capacity: int) -> Cache:
    """An empty cache for one sequence of about `capacity` tokens.

    Models with sliding-window or recurrent layers get transformers' own cache, which knows their kinds.
    """
    if not attends_to_everything(config):
        return DynamicCache(config=config)
    return Cache(layers=[ContiguousLayer(capacity) for _ in range(config.num_hidden_layers)])


def cache_bytes(cache: Cache) -> int:
    """Bytes that the cache's tensors occupy."""
    tensors = (t for layer in cache.layers for t in (layer.keys, layer.values))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
