"""The key-value cache: one buffer a layer, allocated once, written in place.

transformers' DynamicCache concatenates, which copies the whole cache at every step. Here a step writes its rows, and
attention reads a view.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..errors import OutOfMemory, PatchError, Setting
from .rotated_keys import RotatedKeys, allocate


class ContiguousLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, [batch, kv_heads, capacity, head_dim]; doubles when full.

    Attributes:
        length: keys held.
        evicted: keys that were dropped between the first and the last ones. Later keys moved up, with their positions.
            This is exact under a map that sees the first and the last keys only.
        needed: fewest keys to which the layer may be cropped after an eviction.
    """

    buffers: tuple[str, ...] = ("keys", "values")
    is_croppable = True
    is_sliding = False

    def __init__(self, capacity: int = 256) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.evicted = 0
        self.needed = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = allocate(key_states, self.capacity)
        self.values = allocate(value_states, self.capacity)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, kv_heads, n, head_dim] and return views of all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, length: int) -> None:
        """Make room for `length` keys."""
        if length <= self.capacity:
            return
        capacity = max(length, 2 * self.capacity)
        if self.is_initialized:
            self.__dict__.update(self._copied(capacity))
        self.capacity = capacity

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens. `tokens_to_remove` is negative, as in transformers."""
        assert -self.length <= tokens_to_remove <= 0, (tokens_to_remove, self.length)
        self.length += tokens_to_remove

    def evict(self, first: int, count: int, needed: int, moved: Tensor | None = None) -> None:
        """Drop `count` keys after the first `first`. After an interruption nothing has changed.

        Args:
            moved: the keys after them, rotated for their new places; None if they are un-rotated.
        """
        buffers = self._copied(self.capacity, first, count)
        if moved is not None:
            self._write_keys(buffers, first, moved)
        self.__dict__.update(buffers, length=self.length - count, evicted=self.evicted + count, needed=needed)

    def _copied(self, capacity: int, first: int = 0, skip: int = 0) -> dict[str, Tensor]:
        """New buffers without `skip` keys after the first `first`."""
        buffers = {}
        for name in self.buffers:
            old, new = getattr(self, name), self._new(name, capacity)
            new[:, :, :first] = old[:, :, :first]
            new[:, :, first : self.length - skip] = old[:, :, first + skip : self.length]
            buffers[name] = new
        return buffers

    def _new(self, name: str, capacity: int) -> Tensor:
        return allocate(getattr(self, name), capacity)

    @staticmethod
    def _write_keys(buffers: dict[str, Tensor], start: int, keys: Tensor) -> None:
        """Replace keys in `buffers`, from `start` on."""
        buffers["keys"][:, :, start : start + keys.shape[2]] = keys

    def reset(self) -> None:
        self.length = self.evicted = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        self._map_rows(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map_rows(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows `indices`."""
        self._map_rows(lambda buffer: buffer[indices])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


class UnrotatedLayer(ContiguousLayer):
    """A layer for transformers' modules. Under a position map it also stores rotated copies of its un-rotated keys."""

    def __init__(self, capacity: int = 256) -> None:
        super().__init__(capacity)
        self.rotated = RotatedKeys()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self.rotated.capacity = self.capacity
        keys.rotated = self.rotated  # type: ignore[attr-defined]  # the only way to the attention function
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.rotated.crop(self.length)

    def evict(self, first: int, count: int, needed: int, moved: Tensor | None = None) -> None:
        self.rotated.crop(first)
        super().evict(first, count, needed, moved)

    def reset(self) -> None:
        super().reset()
        self.rotated.clear()

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(change)
        self.rotated.map_rows(change)


def attends_to_everything(config: PreTrainedConfig) -> bool:
    """True if every layer of the model is plain causal attention over the whole past."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types) == {"full_attention"}
    return common_window(config) is None


def common_window(config: PreTrainedConfig) -> int | None:
    """The sliding window of a model whose layers are all alike, or None.

    It is None for a family without windows, whatever the config says: a config that was converted from Mistral may
    still have a window, which the model does not read.
    """
    return config.sliding_window if hasattr(type(config), "sliding_window") else None


def adopt(cache: Cache, capacity: int = 256) -> None:
    """Replace the layers of transformers' default cache by ours, if they are empty and see the whole past."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = UnrotatedLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = UnrotatedLayer(capacity)


def new_cache(config: PreTrainedConfig, capacity: int) -> Cache:
    """An empty cache for one sequence of about `capacity` tokens.

    Sliding-window and recurrent layers get transformers' own kinds.
    """
    config = config.get_text_config(decoder=True)
    if attends_to_everything(config):
        config = copy.copy(config)
        config.sliding_window = None  # the model does not read it, but transformers' cache would
    cache = DynamicCache(config=config)
    adopt(cache, capacity)
    return cache


SPARE = 256  # keys held beyond those that a map needs, so that a text can be rewound a little
_STRIDE = 1024  # fewest keys dropped at a time


def most_held(sink_window: tuple[int, int]) -> int:
    """Most keys that a cache holds between two forward passes, for a map that sees the first and last `sink_window`."""
    return sum(sink_window) + SPARE + max(sink_window[1], _STRIDE)


def evict(cache: Cache, sink_window: tuple[int, int], moved: Callable[[int, int, int], Tensor] | None = None) -> None:
    """Drop the keys between the first and the last `sink_window` once there are many. No later token sees them.

    Args:
        moved: the keys of a layer as `ContiguousLayer.evict` takes them, for its index, `first` and `count`.
    """
    if not all(isinstance(layer, ContiguousLayer) for layer in cache.layers):
        return
    excess = cache.get_seq_length() - sum(sink_window) - SPARE
    if excess >= max(sink_window[1], _STRIDE):
        for index, layer in enumerate(cache.layers):
            keys = None if moved is None else moved(index, sink_window[0], excess)
            layer.evict(sink_window[0], excess, sum(sink_window) - 1, keys)


def tokens_read(held: Cache | CacheLayerMixin) -> int:
    """Tokens that a cache, or a layer of it, has read, evicted ones included."""
    first = held if isinstance(held, CacheLayerMixin) else next(iter(held.layers), None)
    return int(held.get_seq_length()) + getattr(first, "evicted", 0)


def layers_agree(cache: Cache) -> bool:
    """True if all layers have evicted the same keys. After an interrupted step they may differ."""
    return len({getattr(layer, "evicted", 0) for layer in cache.layers}) < 2


def can_rewind(cache: Cache, count: int = 0) -> bool:
    """True if the cache can drop its last `count` tokens exactly.

    It cannot if a layer has a window or a state, or lacks evicted keys.
    """
    kinds = {type(layer) for layer in cache.layers} | ({cache.layer_class_to_replicate} - {None})
    if not all(issubclass(kind, ContiguousLayer) or kind is DynamicLayer for kind in kinds):
        return False
    return all(
        layer.length - count >= layer.needed
        for layer in cache.layers
        if isinstance(layer, ContiguousLayer) and layer.evicted
    )


def rewind(cache: Cache, count: int) -> None:
    """Drop the last `count` tokens.

    Raises:
        PatchError: a layer cannot be rewound.
    """
    if not count:  # cropping fails in an empty layer with a window
        return
    if not can_rewind(cache, count):
        raise PatchError(
            f"the last {count} tokens of this cache have to be read again, and its layers (a sliding window, recurrent "
            "ones, or keys that were dropped) cannot be rewound; give a new cache"
        )
    cache.crop(-count)


def cache_bytes(cache: Cache) -> int:
    """Bytes that the cache's tensors occupy."""
    tensors = []
    for layer in cache.layers:
        tensors += [getattr(layer, name) for name in getattr(layer, "buffers", ContiguousLayer.buffers)]
        tensors += layer.rotated.tensors if isinstance(layer, UnrotatedLayer) else []
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


class CacheLost(OutOfMemory):
    """Memory ran out during a step, and the cache cannot be rewound: its text has to be read again."""


@contextlib.contextmanager
def restoring(*caches: Cache) -> Iterator[None]:
    """If memory runs out in the block, rewind the caches to their lengths before it.

    An OutOfMemory of a nested block passes: what was read before that block stays in the caches.

    Raises:
        OutOfMemory: in place of the errors of numpy and torch.
        CacheLost: the same, but a cache could not be rewound.
    """
    before = [tokens_read(cache) for cache in caches]
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        kind = OutOfMemory
        for cache, held in zip(caches, before, strict=True):
            excess = [tokens_read(layer) - held for layer in cache.layers]  # some layers may have the tokens already
            if not (layers_agree(cache) and can_rewind(cache, max(excess, default=0))):
                kind = CacheLost
                break
            for layer, count in zip(cache.layers, excess, strict=True):
                layer.crop(-count)
        raise kind(
            f"out of memory after {sum(before)} tokens; shorten the text, ask for less at a time, load with a smaller ",
            Setting("dtype", form="name"),
            " or ",
            Setting("kv_dtype", form="name"),
            ", or end other programs that take memory",
        ) from error


_LACK_OF_MEMORY = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""In plain RuntimeErrors of torch: on the CPU, from CUDA, and from its libraries."""


def is_lack_of_memory(error: BaseException) -> bool:
    """True if an error means that memory ran out, or follows from such an error: a graph whose capture failed cannot
    be ended, which hides the reason."""
    followed = isinstance(error.__context__, torch.OutOfMemoryError)
    named = any(words in str(error) for words in _LACK_OF_MEMORY)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or followed or named
